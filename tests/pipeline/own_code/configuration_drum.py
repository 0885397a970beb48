from transformers import PretrainedConfig


class DrumConfig(PretrainedConfig):
    model_type = "drum"

    def __init__(self, vocab_size=384, hidden_size=64, num_hidden_layers=2, **rest):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**rest)
