"""One process of a test that needs several: `torchrun processes.py FILE FUNCTION FOLDER SECONDS`.

Calls FUNCTION of the test module FILE with the arguments saved in FOLDER and saves what it returns
there. The fixture `run_processes` in conftest.py starts it; jaxtyping and warnings are as strict as
under pytest.
"""

import faulthandler
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import install_import_hook


def main(file: str, function: str, folder: str, seconds: str) -> None:
    # A process that waits for another for ever says where, and ends.
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    torch.set_num_threads(1)
    install_import_hook("mimic_fast", "beartype.beartype")
    spec = importlib.util.spec_from_file_location("worker", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = torch.load(Path(folder) / "arguments.pt", weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = getattr(module, function)(**arguments)
    torch.save(result, Path(folder) / f"{os.environ['RANK']}.pt")
    if dist.is_initialized():
        dist.barrier()  # gloo aborts a process whose peer is gone while its threads still talk
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
