class Notes:
    """A progress that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def track(self, items, description, total=None, done=0):
        yield from items

    def say(self, message: str) -> None:
        self.said.append(message)
