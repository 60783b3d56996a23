"""The paper's own numbers: VAREdit, arXiv 2508.15772, Tables 1, 2 and 5 to 9, at 512 px.

A judge's scores there are GPT-4o's, or on GEdit-Bench GPT-4.1's: those of another judge cannot be
compared with them.
"""

from dataclasses import dataclass

_EMU = ("overall", "global", "add", "text", "background", "color", "style", "remove", "local")
_PIE = (
    *("overall", "random", "change object", "add object", "delete object", "change content"),
    *("change pose", "change color", "change material", "change background", "change style"),
)
_IMGEDIT = (
    *("background", "extract", "adjust", "style", "remove", "replace", "add", "action", "compose"),
)
_GEDIT = ("overall", "intersection")


@dataclass(frozen=True)
class Published:
    """A number of the paper: of which table, model, group and score."""

    table: int
    model: str
    group: str
    score: str
    value: float


# By benchmark: the table, the score, the groups, and the numbers of 2b and 8b in their order.
_NUMBERS = {
    "emu-edit": [
        (1, "clip_out", ("overall",), "0.271", "0.282"),
        (1, "clip_dir", ("overall",), "0.099", "0.125"),
        (1, "judge_overedit", ("overall",), "7.055", "8.461"),
        (
            *(6, "judge_success", _EMU, "6.210 5.475 6.865 2.708 6.724 7.854 6.740 6.889 6.314"),
            "8.284 7.827 8.857 7.375 8.150 9.285 7.641 8.657 8.040",
        ),
        (
            *(7, "judge_balance", _EMU, "5.662 4.279 6.775 2.887 4.882 7.303 5.661 6.716 5.821"),
            "7.892 7.473 8.460 7.375 6.573 8.870 7.788 8.274 7.652",
        ),
    ],
    "pie-bench": [
        (1, "clip_out", ("overall",), "0.260", "0.266"),
        (1, "clip_edit", ("overall",), "0.225", "0.233"),
        (1, "judge_overedit", ("overall",), "8.083", "8.536"),
        (
            *(8, "judge_success", _PIE),
            "7.530 7.743 8.725 7.463 7.300 6.225 4.450 8.425 7.375 7.950 7.663",
            "8.621 8.643 8.775 8.975 9.163 6.200 6.875 9.325 8.425 9.513 8.475",
        ),
        (
            *(9, "judge_balance", _PIE),
            "6.996 7.330 7.761 7.112 6.942 5.717 4.291 8.032 6.502 6.950 7.348",
            "8.105 8.093 7.940 8.392 8.831 5.936 6.453 8.919 7.755 8.779 8.287",
        ),
    ],
    "imgedit": [
        (
            *(2, "judge_imgedit", _IMGEDIT, "2.95 1.94 3.33 4.05 3.51 3.97 3.57 2.88 2.57"),
            "3.93 1.52 3.98 4.60 4.17 4.54 4.06 4.31 3.30",
        ),
    ],
    "imgedit-uge": [(2, "judge_uge", ("overall",), "2.81", "4.09")],
    "gedit-en": [
        (5, "judge_sc", _GEDIT, "5.121 4.992", "7.292 7.092"),
        (5, "judge_pq", _GEDIT, "5.301 5.220", "6.581 6.626"),
        (5, "judge_overall", _GEDIT, "4.460 4.334", "6.383 6.236"),
    ],
}


def published(benchmark: str) -> list[Published]:
    """Return the paper's numbers of a benchmark; none if it has none."""
    return [
        Published(number, model, group, score, float(value))
        for number, score, groups, small, large in _NUMBERS.get(benchmark, [])
        for model, values in (("2b", small), ("8b", large))
        for group, value in zip(groups, values.split(), strict=True)
    ]
