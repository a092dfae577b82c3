"""What several processes hand over in a step, and how long that may take: a model, not measured.

Every process computes the gradients of its own rows; a ring sums them (Patarasuk and Yuan 2009,
"Bandwidth optimal all-reduce algorithms"). With N processes, a step takes

    compute + 2 (N - 1) / N x bytes / bandwidth + 2 (N - 1) x latency x messages

seconds. Nothing of the sending is hidden here, though most of it goes on beside the backward
(`train.gradient_sum`). That processes wait for a slower one is left out: a model cannot know it.
"""

from dataclasses import asdict, dataclass
from typing import Any

from mlx_qlora.errors import ConfigError
from mlx_qlora.train.gradient_sum import MOST_BUCKETS, SMALLEST_BUCKET

FLOAT32 = 4
SMALL_SUMS = 2  # messages besides the buckets: the counts of a step, and its loss


@dataclass(frozen=True)
class Link:
    """What joins two processes.

    Attributes:
        name: for people.
        nominal: bytes per second one way, as its maker states it.
        share: of that which a ring is expected to reach.
        latency: seconds of one hop.
    """

    name: str
    nominal: float
    share: float
    latency: float

    @property
    def bandwidth(self) -> float:
        """Bytes per second one way that are counted on."""
        return self.nominal * self.share


# Thunderbolt 5: 80 Gb/s each way. Others measured 53 to 64 Gb/s with four TCP streams and 0.3 to
# 0.7 ms there and back (exo-explore/exo#2063); one stream and the additions: 0.5 assumed.
# 10 GbE: 0.9 and 0.1 ms assumed; TCP's and Ethernet's headers alone leave 0.95.
# NVLink of an H100: 900 GB/s both ways together, of 450 one way 370 reached, says NCCL's maintainer
# (NVIDIA/nccl-tests#212); 10 microseconds assumed.
LINKS = (
    Link("Thunderbolt 5", 80e9 / 8, 0.5, 300e-6),
    Link("10 GbE", 10e9 / 8, 0.9, 100e-6),
    Link("NVLink (H100)", 450e9, 370 / 450, 10e-6),
)


@dataclass(frozen=True)
class Expected:
    """A step over one link.

    Attributes:
        link: its name.
        step_seconds: computing and sending, one after the other.
        efficiency: the share of the step that is computing, at most 1.
        tokens_per_second: of all processes together.
    """

    link: str
    step_seconds: float
    efficiency: float
    tokens_per_second: float


@dataclass(frozen=True)
class Scaling:
    """What a run of several processes adds to the plan of one.

    Attributes:
        processes: how many, N.
        trainable: numbers that are trained.
        step_tokens: positions of an optimiser step in one process.
        compute_seconds: of such a step, without the others.
    """

    processes: int
    trainable: int
    step_tokens: int
    compute_seconds: float

    @property
    def handed_bytes(self) -> int:
        """What a process hands to the collectives in a step; some 52 bytes of counts besides."""
        return self.trainable * FLOAT32 if self.processes > 1 else 0

    @property
    def wire_bytes(self) -> int:
        """What a process sends to its neighbour in a step, without the headers of TCP."""
        return 2 * (self.processes - 1) * self.handed_bytes // self.processes

    @property
    def sums_bytes(self) -> int:
        """Memory for it: the buckets and their sums (measured: both are there until the end)."""
        return 2 * self.handed_bytes

    @property
    def messages(self) -> int:
        """Sums of a step, at most."""
        if self.processes == 1:
            return 0
        return -(-self.handed_bytes // bucket_bytes(self.handed_bytes)) + SMALL_SUMS

    def over(self, link: Link) -> Expected:
        """A step over one link."""
        N = self.processes
        sending = self.wire_bytes / link.bandwidth + 2 * (N - 1) * link.latency * self.messages
        seconds = self.compute_seconds + sending
        together = N * self.step_tokens / seconds
        return Expected(link.name, seconds, self.compute_seconds / seconds, together)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it; sizes in bytes, times in seconds."""
        return {
            "processes": self.processes,
            "added_bytes": self.sums_bytes,
            "handed_bytes": self.handed_bytes,
            "wire_bytes": self.wire_bytes,
            "messages": self.messages,
            "step_tokens": self.processes * self.step_tokens,
            "compute_seconds": self.compute_seconds,
            "links": [asdict(self.over(link)) for link in LINKS],
        }

    def __str__(self) -> str:
        handed, wire = self.handed_bytes / 1e9, self.wire_bytes / 1e9
        tokens = self.processes * self.step_tokens
        lines = [
            f"{'processes':<22}{self.processes}; each needs the memory above",
            f"{'handed over':<22}{handed:.3f} GB a step; {wire:.3f} GB sent by each process",
            f"{'step of all':<22}{tokens:,} tokens; expected by a model that hides no sending:",
        ]
        for link in LINKS:
            found = self.over(link)
            lines.append(
                f"  {link.name:<20}{found.step_seconds:,.2f} s, efficiency {found.efficiency:.4f}, "
                f"about {found.tokens_per_second:,.0f} tokens/s"
            )
        return "\n".join(lines)


def bucket_bytes(total: int) -> int:
    """The least size of a bucket, as `GradientSum` cuts them."""
    return max(SMALLEST_BUCKET, total // MOST_BUCKETS)


def check_processes(processes: int | None) -> None:
    """Refuses a number that no launcher could start.

    Raises:
        ConfigError: not a whole number of at least 1.
    """
    if processes is None:
        return
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise ConfigError(
            f"--processes must be a whole number of at least 1; got {processes!r}: "
            "pass as many as `mlx.launch` will start"
        )
