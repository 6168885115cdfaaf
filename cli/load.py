"""Load tests: the latency of a service, its highest rate, overload, and whether two results differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import UsersFile, print_result, use_cores

if TYPE_CHECKING:
    from benchmarks.load.traffic import Shape

commands = typer.Typer()

_Address = Annotated[str, typer.Option(metavar="HOST:PORT", help="Service to measure.")]
_Against = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Another service, measured in turn with the first; needs --out and --rate."),
]
_Requests = Annotated[int | None, typer.Option(min=1, metavar="N", help="Requests to send.")]
_Rate = Annotated[
    str,
    typer.Option(metavar="R|half|Mx", help="Requests per second; half of the highest; M times recorded traffic."),
]
_Duration = Annotated[float | None, typer.Option(min=0.1, metavar="S", help="Length of the measurement, in seconds.")]
_Windows = Annotated[int, typer.Option(min=1, metavar="N", help="Windows that the measurement is divided into.")]
_FindMax = Annotated[bool, typer.Option("--find-max", help="Find the highest rate at which --slo-p99 holds.")]
_SloP99 = Annotated[
    float, typer.Option("--slo-p99", min=0.1, metavar="MS", help="Limit of the 99th percentile (--find-max, overload).")
]
_SloErrors = Annotated[
    float,
    typer.Option("--slo-errors", min=0, max=1, metavar="SHARE", help="Limit of the share of errors."),
]
_WindowS = Annotated[float, typer.Option("--window", min=1, metavar="S", help="Seconds of a window (--find-max).")]
_Repeats = Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="Searches to make (--find-max).")]
_Mix = Annotated[
    str, typer.Option(metavar="METHOD=WEIGHT,...", help="Shares of recommend, search, rank, similar and ingest.")
]
_Zipf = Annotated[
    float, typer.Option(min=0, metavar="S", help="Exponent of the users' activity; 0 draws all alike, 1 is usual.")
]
_Bursts = Annotated[
    str | None, typer.Option(metavar="FxS/E", help="F times the rate for S of every E seconds; the mean stays.")
]
_Recorded = Annotated[
    Path | None,
    typer.Option(metavar="WAREHOUSE", exists=True, file_okay=False, help="Warehouse whose traffic is sent again."),
]
_Surface = Annotated[str, typer.Option(metavar="NAME", help="Surface that the requests name.")]
_PageSize = Annotated[int, typer.Option(min=1, max=100, metavar="N", help="Items of a slate.")]
_Candidates = Annotated[int, typer.Option(min=1, max=5000, metavar="N", help="Candidates of a Rank request.")]
_Bundle = Annotated[
    Path | None,
    typer.Option(metavar="DIR", exists=True, file_okay=False, help="The service's bundle: its items and vectors."),
]
_Queries = Annotated[
    Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Queries to search for, one a line.")
]
_Timeout = Annotated[float, typer.Option(min=0.01, metavar="S", help="Deadline of each request, in seconds.")]
_Check = Annotated[
    str | None,
    typer.Option(
        metavar="all|NAME,...",
        help="Quality to check meanwhile: agreement, staleness, eligibility, recall; the middle two write.",
    ),
]
_Pid = Annotated[int | None, typer.Option(metavar="PID", help="The service's process, if it is not the one listening.")]
_Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of arrivals, users and items.")]
_Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE", dir_okay=False, help="File for the result."),
]
_OutAgainst = Annotated[
    Path | None, typer.Option(metavar="FILE", dir_okay=False, help="File for the result of --against.")
]
_ResultFile = Annotated[
    Path, typer.Argument(metavar="RESULT.json", exists=True, dir_okay=False, help="A result of bench latency.")
]


# The options of one command share a signature: Typer reads them from nowhere else.
@commands.command()
def latency(
    target: _Address,
    users: UsersFile,
    requests: _Requests = None,
    rate: _Rate = "half",
    duration: _Duration = None,
    windows: _Windows = 10,
    find_max: _FindMax = False,
    slo_p99: _SloP99 = 50.0,
    slo_errors: _SloErrors = 0.0,
    window_s: _WindowS = 8.0,
    repeats: _Repeats = 1,
    mix: _Mix = "recommend=1",
    zipf: _Zipf = 1.0,
    bursts: _Bursts = None,
    recorded: _Recorded = None,
    surface: _Surface = "",
    page_size: _PageSize = 10,
    candidates: _Candidates = 200,
    bundle: _Bundle = None,
    queries: _Queries = None,
    timeout_s: _Timeout = 1.0,
    check: _Check = None,
    against: _Against = None,
    pid: _Pid = None,
    seed: _Seed = 1,
    out: _Out = None,
    out_against: _OutAgainst = None,
) -> None:
    """Measures the latency of a service from the intended start of each request, or its highest rate."""
    use_cores(1)
    from benchmarks import highest_rate, latency_pairs
    from benchmarks import latency as tool
    from benchmarks.load.ceiling import Promise
    from benchmarks.load.quality import parse_checks

    shape = _shape(mix, zipf, bursts, surface, page_size, candidates, timeout_s)
    named = tool.Target(target, users, bundle, queries, recorded, pid, seed)
    checks = parse_checks(check) if check else None
    if find_max:
        promise = Promise(slo_p99, slo_errors)
        result = highest_rate.find_max(named, promise, window_s=window_s, shape=shape, checks=checks, repeats=repeats)
    elif against:
        pair = latency_pairs.Pair(named, against, out, out_against)
        result = latency_pairs.latency_against(pair, rate, requests, duration, windows, shape)
        out = None
    else:
        result = tool.latency(
            named, requests=requests, rate=rate, duration=duration, windows=windows, shape=shape, checks=checks
        )
    if out:
        tool.save(out, result)
    print_result(result)


def _shape(
    mix: str, zipf: float, bursts: str | None, surface: str, page_size: int, candidates: int, timeout_s: float
) -> Shape:
    from benchmarks.load.traffic import Shape, parse_bursts, parse_mix

    return Shape(
        parse_mix(mix), zipf, parse_bursts(bursts) if bursts else None, page_size, candidates, surface, 0.0, timeout_s
    )


@commands.command()
def overload(
    target: _Address,
    users: UsersFile,
    times: Annotated[
        float, typer.Option(min=1, metavar="N", help="Offered rate, as a multiple of the highest.")
    ] = 10.0,
    seconds: Annotated[float, typer.Option(min=1, metavar="S", help="Length of each phase, in seconds.")] = 10.0,
    highest: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="R", help="The highest rate, as --find-max found it; else measured first."),
    ] = None,
    slo_p99: _SloP99 = 50.0,
    mix: _Mix = "recommend=1",
    page_size: _PageSize = 10,
    candidates: _Candidates = 200,
    bundle: _Bundle = None,
    queries: _Queries = None,
    timeout_s: _Timeout = 1.0,
    pid: _Pid = None,
    seed: _Seed = 1,
    out: _Out = None,
) -> None:
    """Measures a service under several times its highest rate: goodput, refusals, priorities, memory, recovery."""
    use_cores(1)
    from benchmarks import overload as tool
    from benchmarks.latency import Target, save
    from benchmarks.load.ceiling import Promise

    named = Target(target, users, bundle, queries, None, pid, seed)
    load = tool.Overload(times, seconds, highest, Promise(slo_p99))
    result = tool.overload(named, load, _shape(mix, 1.0, None, "", page_size, candidates, timeout_s))
    if out:
        save(out, result)
    print_result(result)


@commands.command()
def compare(
    first: _ResultFile,
    second: Annotated[
        Path | None, typer.Argument(metavar="[OTHER.json]", exists=True, dir_okay=False, help="The other result.")
    ] = None,
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Check on RESULT's own windows how often this finds a difference.")
    ] = False,
    slowdown: Annotated[
        float, typer.Option(min=1.001, metavar="FACTOR", help="The slowdown that --self-check plants.")
    ] = 1.1,
) -> None:
    """Tells whether two results differ by more than noise; exit status 1 if they do."""
    import json

    from benchmarks.load import compare as tool
    from benchmarks.report import BenchmarkError

    results = [json.loads(path.read_text(encoding="utf-8")) for path in (first, second) if path]
    if self_check:
        print_result(tool.self_check(results[0], slowdown=slowdown))
        return
    if len(results) < 2:
        raise BenchmarkError("name two results to compare, or one with --self-check")
    outcome = tool.compare(*results)
    print_result(outcome)
    # For a pipeline that must not pass a slower build.
    raise typer.Exit(int(outcome["different"]))


@commands.command("load-report")
def load_report(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULT.json...", exists=True, dir_okay=False, help="Results of load measurements."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", dir_okay=False, help="The page.")] = Path("load-report.html"),
) -> None:
    """Writes one self-contained HTML page of results: curves, quality, overload; two of latency are compared."""
    from benchmarks.load.page import write_page

    print_result({"report": write_page(results, out)})
