"""Score the edits of a bundle on the field's benchmarks: `varedit-export evaluate`.

    benchmark -> cases -> [the bundle edits] -> pictures -> [metrics] -> scores -> report

A benchmark is a file in `benchmarks/` and a line of its table; a family of metrics is a file in
`metrics/` and a line of its table. `case` has the interfaces of both. A run is a folder, which
`run` writes as it goes.
"""
