"""Feed the artifact's loader what nobody meant to write, and count what becomes of it.

Every case is a valid artifact changed by one to three mutations. It must be accepted as a valid
graph or refused with one line; anything else is a bug and is printed with its seed.

    python studies/fuzz.py --cases 100000
"""

from __future__ import annotations

import copy
import json
import random
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import process_time
from typing import Any

from seeds import Tally, arguments

from spiffy.schemas import (
    AcceptanceModel,
    CalibrationRecord,
    CostPoint,
    CostProfile,
    DecodingSettings,
    DraftGraph,
    ExpectedSteps,
    ModelRecord,
    Node,
    Provenance,
    SpiffyError,
)
from spiffy.schemas.errors import MAX_MESSAGE
from spiffy.schemas.io import MAX_BYTES

Json = Any


def base_graph() -> DraftGraph:
    """A small artifact with a value in every field."""
    curve = tuple(CostPoint(drafts=n, seconds=0.01 * (1 + n / 8)) for n in (0, 1, 4))
    return DraftGraph(
        model=ModelRecord(family="llada", id="tiny", fingerprint="ab12", vocab_size=320),
        decoding=DecodingSettings.parse(policy="static"),
        calibration=CalibrationRecord(
            dataset="synthetic",
            dataset_sha256="0" * 64,
            samples=40,
            held_out_samples=10,
            roots=100,
            seed=0,
            objective="expected-steps",
            tool_version="0.1.0",
            prompts=50,
            edges=("complete", "first"),
        ),
        exact=True,
        nodes=(
            Node(fill=((0, 0),), parents=(0,), count=60),
            Node(fill=((1, 0),), parents=(0,), count=30),
            Node(fill=((0, 0), (1, 0)), parents=(1, 2), count=25),
            Node(fill=((0, 1),), parents=(0,), count=10),
        ),
        expected_steps=(1.0, 1.5, 1.75, 2.0, 2.125),
        acceptance=AcceptanceModel(
            position={"logit": 1.0, "nearness": 0.5},
            token={"log_p": 1.0},
            bigrams=((1, 2, 3), (2, 1, 2)),
            expected_steps=(ExpectedSteps(drafts=0, steps=1.0), ExpectedSteps(drafts=4, steps=2.5)),
        ),
        cost_profiles=(
            CostProfile(
                device="cpu", dtype="float32", points=curve, turns={"graph": curve[1:]}, largest=4
            ),
        ),
        provenance=Provenance(versions={"python": "3.11"}, command=("spiffy-calibrate",)),
    )


RAW: dict[str, str] = {}


def raw(text: str) -> str:
    """A mark that `write` replaces by JSON text that `json.dumps` would not write."""
    mark = f"@raw{len(RAW)}@"
    RAW[mark] = text
    return mark


HOSTILE: tuple[Json, ...] = (
    *(None, True, False, 0, 1, -1, 2, 4096, 4097, 1023, 1024, 2**31, 2**53, 2**63, 2**64, -(2**63)),
    *(10**18, 10**400, 10**4200, 0.0, -0.5, 1.5, 1e-320, 1e308, -1e308, 1e6, 1000001.0),
    *(
        "",
        "x",
        "0",
        "1.0",
        "\n",
        "a\nb",
        "\x1b[2J",
        "\u2028",
        "\ud800",
        "\0",
        "x" * 1001,
        "é" * 9999,
    ),
    *([], {}, [[]], [0], [[0, 0]], [[0, 0]] * 3, [0] * 5000, {"": 0}, {"a\nb": 1}, [[], {}] * 20),
    *(raw("NaN"), raw("-Infinity"), raw("1e400"), raw("-1e400"), raw("1" * 5000), raw("1E+99999")),
    *(
        raw("[" * 300 + "]" * 300),
        raw("[" * 20000 + "]" * 20000),
        raw('{"a":' * 500 + "1" + "}" * 500),
    ),
    *(raw("[1,]"), raw("'x'"), raw("\\"), raw("01"), raw("+1"), raw('{"a":1,"a":2}'), raw('"\\x"')),
)


def hostile(rng: random.Random) -> Json:
    """One of `HOSTILE`, to be changed further."""
    return copy.deepcopy(rng.choice(HOSTILE))


VERSIONS = (
    "0.9",
    "1.0",
    "1.1",
    "1.2",
    "1.3",
    "1.99",
    "1.999999",
    "2.0",
    "17.1",
    "1",
    "",
    "1.x",
    "01.2",
)


def places(content: Json) -> list[tuple[Json, Any]]:
    """All (container, key) pairs of a JSON tree."""
    found: list[tuple[Json, Any]] = []
    open_ = [content]
    while open_:
        holder = open_.pop()
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            found.append((holder, key))
            if isinstance(value, dict | list):
                open_.append(value)
    return found


def write(content: Json, marks: Mapping[str, str] = RAW) -> str:
    """JSON text, with what the marks stand for in their place."""
    text = json.dumps(content)
    for mark, stands_for in marks.items():
        if mark in text:
            text = text.replace(f'"{mark}"', stands_for)
    return text


Tree = Callable[[random.Random, Json], None]


def _replace(rng: random.Random, content: Json) -> None:
    holder, key = rng.choice(places(content))
    holder[key] = hostile(rng)


def _delete(rng: random.Random, content: Json) -> None:
    holder, key = rng.choice(places(content))
    del holder[key]


def _nudge(rng: random.Random, content: Json) -> None:
    numbers = [(h, k) for h, k in places(content) if type(h[k]) in (int, float)]
    if numbers:
        holder, key = rng.choice(numbers)
        holder[key] = rng.choice(
            (holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 1000)
        )


def _swap(rng: random.Random, content: Json) -> None:
    (a, i), (b, j) = rng.choice(places(content)), rng.choice(places(content))
    copies = json.loads(json.dumps((a[i], b[j]), default=str))
    a[i], b[j] = copies[1], copies[0]


def _repeat(rng: random.Random, content: Json) -> None:
    lists = [holder[key] for holder, key in places(content) if isinstance(holder[key], list)]
    if lists:
        chosen = rng.choice(lists)
        copies = json.loads(json.dumps(chosen[:10], default=str))
        chosen.extend(copies * rng.choice((1, 2, 500)))


def _shuffle(rng: random.Random, content: Json) -> None:
    lists = [holder[key] for holder, key in places(content) if isinstance(holder[key], list)]
    if lists:
        rng.shuffle(rng.choice(lists))


def _unknown(rng: random.Random, content: Json) -> None:
    dicts = [content, *(h[k] for h, k in places(content) if isinstance(h[k], dict))]
    rng.choice(dicts)[rng.choice(("new", "gain", "\n", "x" * 5000))] = hostile(rng)


def _version(rng: random.Random, content: Json) -> None:
    content["version"] = rng.choice(VERSIONS)


def _nodes(rng: random.Random, content: Json) -> None:
    """Another graph, closed or nearly so."""
    fills: list[dict[int, int]] = [{}]
    nodes = []
    for _ in range(rng.choice((0, 1, 8, 40))):
        parent = rng.randrange(len(fills))
        fill = {**fills[parent], rng.randrange(40): rng.randrange(5)}
        number = parent if rng.random() < 0.98 else rng.randrange(-2, 50)
        nodes.append({"fill": sorted(map(list, fill.items())), "parents": [number], "count": 1})
        fills.append(fill)
    content["nodes"] = nodes
    content["expected_steps"] = []


TREE: dict[str, Tree] = {
    "value": _replace,
    "missing": _delete,
    "number": _nudge,
    "swap": _swap,
    "repeat": _repeat,
    "shuffle": _shuffle,
    "unknown": _unknown,
    "version": _version,
    "nodes": _nodes,
}


def _bytes(rng: random.Random, raw: bytes) -> bytes:
    at, end = sorted((rng.randrange(len(raw)), rng.randrange(len(raw))))
    some = rng.choice(
        (b"\x00", b"\xff", b"\xed\xa0\x80", b"{", b"}", b"[", b"]", b",", b'"', b"9" * 40)
    )
    return rng.choice(
        (raw[:at] + some + raw[at + 1 :], raw[:at] + raw[end:], raw[:at] + some + raw[at:])
    )


def _encoding(rng: random.Random, raw: bytes) -> bytes:
    text = raw.decode()
    return rng.choice(
        (
            b"\xef\xbb\xbf" + raw,
            text.encode("utf-16"),
            text.encode("utf-32"),
            raw + b"\x00",
            raw * 2,
        )
    )


def _twice(rng: random.Random, raw: bytes) -> bytes:
    keys = [key for key in (b'"count"', b'"model"', b'"exact"', b'"nodes"', b'"id"') if key in raw]
    key = rng.choice(keys)
    return raw.replace(key, key + b": 1, " + key, 1)


TEXT: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "truncated": lambda rng, raw: raw[: rng.randrange(len(raw))],
    "bytes": _bytes,
    "encoding": _encoding,
    "duplicate key": _twice,
    "spaces": lambda rng, raw: b" " * rng.choice((1, 10_000)) + raw,
}


def case(seed: int, stored: str) -> tuple[str, bytes]:
    """Kind and bytes of one case; `stored` is the artifact to start from."""
    rng = random.Random(seed)
    kind = rng.choice((*TREE, *TREE, *TEXT))
    content = json.loads(stored)
    if rng.random() < 0.95:
        del content["digest"]  # or nothing gets beyond it
    if kind in TEXT:
        if rng.random() < 0.3:
            _replace(rng, content)
        return kind, TEXT[kind](rng, write(content).encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        TREE[kind](rng, content)
        if not content or any(isinstance(v, str) and v in RAW for v in content.values()):
            break
    return kind, write(content).encode("utf-8", "surrogatepass")


def giants(scale: float = 1.0) -> Iterator[tuple[str, bytes]]:
    """Cases that try to take long or much memory; with a scale of 1 about as large as may be."""
    size = int(scale * (MAX_BYTES - 4000))
    head = json.loads(base_graph().to_json())
    del head["digest"]

    def with_nodes(nodes: str) -> bytes:
        return write({**head, "expected_steps": [], "nodes": "@"}, {"@": nodes}).encode()

    node = '{"fill":[[0,0]],"parents":[0],"count":1}'
    yield "a million nodes", with_nodes("[" + ",".join([node] * (size // 8)) + "]")
    yield "too many nodes", with_nodes("[" + ",".join([node] * (size // 56)) + "]")
    yield "lists", with_nodes("[" + "[]," * (size // 3) + "[]]")
    yield "objects", with_nodes("[" + "{}," * (size // 3) + "{}]")
    objects = "[" + "{}," * (size // 3) + "{}]"
    yield "unknown objects", write({**head, "x": "@"}, {"@": objects}).encode()
    yield "depth", with_nodes("[" * (size // 3) + "]" * (size // 3))
    yield "digits", with_nodes("[" + ("9" * 4299 + ",") * (size // 4400) + "1]")
    yield "more digits", with_nodes("9" * size)
    yield "long text", write({**head, "model": {**head["model"], "id": "x" * size}}).encode()
    keys = ",".join(f'"k{n}":1e9' for n in range(size // 16))
    wrong = {**head["acceptance"], "position": "@"}
    yield "coefficients", write({**head, "acceptance": wrong}, {"@": "{" + keys + "}"}).encode()
    wrong = {**head["acceptance"], "bigrams": "@"}
    pairs = "[" + "[0,0,-1]," * (size // 10) + "[1,1,1]]"
    yield "bigrams", write({**head, "acceptance": wrong}, {"@": pairs}).encode()
    keys = ",".join(f'"k{n}":1' for n in range(size // 14))
    yield "one key twice", write({**head, "x": "@"}, {"@": "{" + keys + ',"k0":1}'}).encode()
    deep, nodes = "", []  # every node extends all before it that are among its parents
    for number in range(1, 1024):
        deep += f"{',' if deep else ''}[{number - 1},0]"
        parents = ",".join(map(str, range(number)))
        nodes.append(f'{{"fill":[{deep}],"parents":[{parents}],"count":1}}')
        if sum(map(len, nodes)) > size - 20_000:
            break
    yield "a thousand parents each", with_nodes("[" + ",".join(nodes) + "]")


def verdict(path: Path) -> tuple[str, float]:
    """What the loader does with a file, and how many seconds of the processor it takes.

    "accepted", "refused", or what is wrong with that.
    """
    started = process_time()
    graph, problem = None, ""
    try:
        graph = DraftGraph.load(path)
    except SpiffyError as error:
        message = str(error)
        good = message.isprintable() and 0 < len(message) <= MAX_MESSAGE
        problem = "refused" if good else f"BAD MESSAGE of {len(message)} characters"
    except Exception as error:  # what this is looking for
        problem = f"TRACEBACK {type(error).__name__}: {error}"[:200]
    seconds = process_time() - started
    if graph is not None:
        problem = "accepted" if is_valid(graph) else "ACCEPTED WITHOUT BEING A GRAPH"
    return problem, seconds


def is_valid(graph: DraftGraph) -> bool:
    """Check closure and round trip, independently of the schema's own checks."""
    fills = [set(), *(set(node.fill) for node in graph.nodes)]
    for number, node in enumerate(graph.nodes, start=1):
        if not all(fills[p] < fills[number] and p < number for p in node.parents):
            return False
    distinct = len({tuple(sorted(fill)) for fill in fills}) == len(fills)
    text = graph.to_json()
    return distinct and DraftGraph.model_validate_json(text).to_json() == text


def main() -> None:
    """Run all cases and print the counts."""
    options = arguments(__doc__, 100_000).parse_args()
    stored = base_graph().to_json()
    tally = Tally(("accepted", "refused"))
    with tempfile.TemporaryDirectory() as folder:

        def judge(kind: str, name: str, raw: bytes | None) -> None:
            path = Path(folder) / "graph.json"
            if raw is None:
                with path.open("wb") as file:
                    file.truncate(10**9)
            else:
                path.write_bytes(raw)
            found, seconds = verdict(path)
            tally.add(kind, found, name, seconds)
            path.unlink()  # a file system may take long to empty a file

        for seed in tally.seeds(options):
            kind, raw = case(seed, stored)
            judge(kind, f"seed {seed} ({kind})", raw)
        small = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for kind, raw in giants():
            judge("giants", kind, raw)
        judge("giants", "a sparse gigabyte", None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(tally.table())
    print(f"peak memory {small / 1024:.0f} MB, {peak / 1024:.0f} MB with the giants")
    print(tally.line())
    sys.exit(bool(tally.bugs))


if __name__ == "__main__":
    main()
