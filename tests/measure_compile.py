"""Measure the compilation of a bundle's graphs, one process each: time, memory, size of the plan.

    python tests/measure_compile.py bundles/2b-512 --architecture sm89
    python tests/measure_compile.py bundles/8b-1024 --stage scale_00 --stage scale_12

With tensorrt-rtx, which needs no GPU for it, weights external.
"""

import argparse
import json
import multiprocessing
import resource
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter


def main() -> None:
    from varedit_engines.compile_set import stages_of
    from varedit_runtime.bundle import Bundle

    parser = argparse.ArgumentParser(description="Measure the compilation of graphs.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--architecture", default="sm89")
    parser.add_argument("--stage", action="append", help="by default all")
    given = parser.parse_args()
    variant = Bundle.open(given.bundle).manifest.variant(None)
    for stage in given.stage or stages_of(variant, "external"):
        # A fresh process: the largest resident set is that of this graph alone.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            told = pool.apply(compile_one, (given.bundle, stage, given.architecture))
        print(json.dumps({"stage": stage, **told}), flush=True)


def compile_one(bundle: Path, stage: str, architecture: str) -> dict[str, float]:
    from varedit_engines.compile_set import CompileJob
    from varedit_engines.engine_compiler import EngineCompiler
    from varedit_engines.network import external_inputs
    from varedit_runtime.backends.engines.packing import pack_into
    from varedit_runtime.bundle import Bundle

    compiler = EngineCompiler("tensorrt-rtx", architectures=[architecture])
    job = CompileJob(Bundle.open(bundle), "external", compiler)
    graph, _ = external_inputs(job.bundle.graph_bytes(job.variant.name, stage))
    start = perf_counter()
    plan, _ = compiler.compile(stage, graph, job.bundle.graphs_folder, [], lambda *_: None)
    seconds = perf_counter() - start
    with TemporaryDirectory() as folder:
        file = Path(folder, "plan.gz")
        pack_into(file, plan)
        packed = file.stat().st_size
    return {
        "seconds": round(seconds, 1),
        "peak GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        "plan MB": round(len(plan) / 1e6, 1),
        "file MB": round(packed / 1e6, 1),
    }


if __name__ == "__main__":
    main()
