"""That compiling kernels is said once, and only where it takes time."""

from __future__ import annotations

from unittest.mock import patch

from checks_common import pack


def check_said_while_compiling_once_per_kind():
    compiling, shown, times = pack("nodes.compiling"), [], iter([0.0, 9.5, 10.0, 10.1, 11.0, 14.0])
    records: list[str] = []
    with (
        patch.object(compiling, "_ready", set()),
        patch.object(compiling, "show_text", lambda text, node: shown.append(text)),
        patch.object(compiling.time, "monotonic", lambda: next(times)),
        patch.object(compiling.logger, "info", lambda text, *values: records.append(text % values)),
    ):
        for kind in ("first", "first", "clean", "later"):
            with compiling.said_while_compiling(kind):
                pass
    before, after = shown
    assert "once per machine" in before and after == "Kernels were ready after 9.5 s."
    assert [text for text in records if "compiled in" in text] == [
        "Kernels were compiled in 9.5 s; Triton's cache keeps them for the next start.",
        "Kernels were compiled in 3.0 s; Triton's cache keeps them for the next start.",
    ]
