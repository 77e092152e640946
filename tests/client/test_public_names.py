"""What `import topk_grpc` gives: nothing comes or goes unnoticed."""

from __future__ import annotations

import subprocess
import sys

import topk_grpc
from topk_grpc._version import VERSION

PUBLIC = """
    Answer BlockingTopKClient Bounds Certificate Change ChangeKind ChartHistory ChartSummary ClientStats DeadlineError
    DuplicateBatchError Entry Finality GlobalWindow InvalidArgumentError OutOfRangeError PermissionDeniedError Play
    ProducerExpiredError RangeWindow RateLimitedError Rejected RejectedPlaysError ResourceExhaustedError SessionWindow
    SlidingWindow SongStanding SongsAnswer TlsOptions TopKClient TopKError TumblingWindow UnauthenticatedError
    UnavailableError UnsupportedError WatchUpdate Window WindowError __version__ parse_window
"""


def test_public_names() -> None:
    assert sorted(topk_grpc.__all__) == sorted(PUBLIC.split())
    assert set(topk_grpc.__all__) <= set(dir(topk_grpc))
    for name in topk_grpc.__all__:
        assert getattr(topk_grpc, name) is not None
    assert topk_grpc.__version__ == VERSION
    assert not hasattr(topk_grpc, "NoSuchName")


def test_importing_the_package_leaves_grpc_alone() -> None:
    code = "import sys, topk_grpc; print(any(name in sys.modules for name in ('grpc', 'numpy', 'asyncio')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "False"
