"""`torch.compile` takes packed layers as one operator each."""

import json
import subprocess
import sys


def test_packed_layers_break_no_graph() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.quantizers.compile_packed"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout)) == 14
