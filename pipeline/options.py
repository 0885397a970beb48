"""The command line's arguments and options: each named, typed and explained once, and used by several commands."""

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(help="folder with safetensors, Hub id, GGUF file, or `demo`")]
FolderArgument = Annotated[Path, typer.Argument(help="folder that `compress` wrote")]
NameArgument = Annotated[str, typer.Argument(help="NAME (the latest version), NAME:VERSION or NAME@ALIAS")]
PasswordVariable = Annotated[
    str | None, typer.Option(help="environment variable with the private key's password, if it has one")
]
TokenVariable = Annotated[
    str | None,
    typer.Option(
        "--identity-token-variable",
        help="environment variable with the token to sign with; else the CI's, else a browser asks",
    ),
]
PublicKey = Annotated[Path | None, typer.Option(help="require a signature of this key, in PEM")]
Identity = Annotated[
    str | None, typer.Option(help="require a keyless signature of this e-mail address or URI; with --issuer")
]
Issuer = Annotated[str | None, typer.Option(help="URL of the service that vouches for the identity")]
TrustConfig = Annotated[
    Path | None,
    typer.Option(help="trust configuration of a private Sigstore, in JSON; else the public one, from the network"),
]
Revision = Annotated[str | None, typer.Option(help="commit, tag or branch of a Hub id")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="run the code that comes with the model; it may do anything that you may"),
]
BudgetOption = Annotated[
    str,
    typer.Option(
        "--budget",
        "-b",
        help="2.75bpw (compressed matrices), 180MB or 4.2GiB (whole folder), or 40%; several with commas: 2.5bpw,3bpw",
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="folder to write, made with its parents; must not hold anything else; with several budgets, their parent",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(help="name in the registry, the folder's by default; with several budgets, followed by the budget"),
]
Preset = Annotated[
    str,
    typer.Option(help="fast: fewer samples, minutes on a CPU; default: the full recipe; best: that and recovery"),
]
Rank = Annotated[list[int] | None, typer.Option(help="rank of a low-rank part on offer; repeat for several; 0: none")]
FactorBits = Annotated[
    list[int] | None, typer.Option(help="16, 8, 6, 4 or 3 bits a number of a low-rank part; repeat for several")
]
Dataset = Annotated[str | None, typer.Option(help="calibration text: .txt, .jsonl, .parquet, or a dataset's Hub id")]
DatasetRevision = Annotated[str | None, typer.Option(help="commit of that dataset")]
NumSamples = Annotated[int | None, typer.Option(help="calibration windows for statistics")]
SeqLen = Annotated[int | None, typer.Option(help="tokens of a calibration window")]
Seed = Annotated[int | None, typer.Option(help="of every random draw")]
Sensitivity = Annotated[
    str | None,
    typer.Option(
        help="metric of the error: kronecker, sequence, guided, kl (no gradients), input, fisher, factored "
        "(megabytes), or none"
    ),
]
Candidate = Annotated[list[str] | None, typer.Option(help="quantizer on offer, e.g. lloyd3-g64-s4; repeat for several")]
Override = Annotated[
    list[str] | None, typer.Option(help="'REGEX=QUANTIZER': what matching matrices get, e.g. 'down_proj=nf4'")
]
Embeddings = Annotated[
    str | None,
    typer.Option(
        help="quantizer of token embeddings and output head, e.g. lloyd5-g64-s6, or none to leave them as they are; by "
        "default the program chooses for a budget in bytes, and leaves them for one in bits per parameter"
    ),
]
ShareGroups = Annotated[
    bool | None, typer.Option(help="matrices that read the same input (q/k/v, gate/up) get the same choice")
]
CostRows = Annotated[int | None, typer.Option(help="rows of a matrix that the cost table samples")]
Solver = Annotated[str | None, typer.Option(help="highs or cbc")]
Recover = Annotated[
    bool | None, typer.Option(help="train what is stored beside the codes on the calibration text; sizes stay")
]
RecoverSamples = Annotated[
    int | None,
    typer.Option(
        help="windows of the calibration text for that training, 416 by default; a few are kept to check with"
    ),
]
RecoverSteps = Annotated[int | None, typer.Option(help="steps of that training at most, 200 by default")]
RecoverLearningRate = Annotated[
    float | None,
    typer.Option(help="of that training, at its height; 0.001 by default; less is taken where little is left"),
]
RecoverKlWeight = Annotated[
    float | None, typer.Option(help="weight in that training's loss of the divergence from the original, 1 by default")
]
RecoverHiddenWeight = Annotated[
    float | None, typer.Option(help="weight of the relative error of what the output head reads, 0 by default")
]
RecoverCeWeight = Annotated[float | None, typer.Option(help="weight of the text's cross-entropy, 0 by default")]
RecoverTrain = Annotated[list[str] | None, typer.Option(help="factors, norms, scales or biases; repeat for several")]
EvalDataset = Annotated[str | None, typer.Option(help="evaluation text: .txt, .jsonl, .parquet, or a dataset's Hub id")]
EvalDatasetRevision = Annotated[str | None, typer.Option(help="commit of that dataset")]
EvalWindows = Annotated[int | None, typer.Option(help="windows to evaluate on; 0 to skip")]
EvalSeqLen = Annotated[int | None, typer.Option(help="tokens of an evaluation window")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Adapter = Annotated[Path | None, typer.Option(help="folder that `finetune` wrote for this model")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress and no tables")]
