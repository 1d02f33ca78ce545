"""One process of a run that torchrun started: `worker.py FOLDER STAGE UNTIL`; it goes on from a checkpoint, if any."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def load(name, path, package=False):
    where = [str(path.parent)] if package else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=where)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(folder, stage, until):
    import torch

    torch.set_num_threads(1)
    load("sparse_forcing_pack", HERE.parents[1] / "__init__.py", package=True)
    toys = load("toys", HERE / "conftest.py")
    from sparse_forcing_pack.sparse_attn.training import dmd_config, parallel

    processes = parallel.join("cpu")
    run = toys.toy_run(
        Path(folder), getattr(dmd_config, stage), processes=processes, batch=4, save_every=1, clean_weight=0.1,
        recompute_critic=True, frames=6, **(toys.LONG if stage == "LongTuning" else {}),
    )  # fmt: skip
    split = [p for p in run.student.parameters() if hasattr(p, "to_local")]
    assert len(split) == (0 if processes.size == 1 else len(list(run.student.parameters())))
    run.resume()
    run.run(int(until))


if __name__ == "__main__":
    main(*sys.argv[1:])
