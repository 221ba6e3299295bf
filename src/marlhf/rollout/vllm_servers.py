"""vLLM servers at addresses, on other GPUs than the trainer's.

Every rank shares its sequences out over all servers. The first rank sends the weights, over one of
vLLM's weight-transfer engines (`vllm_transfer`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig

from marlhf.common.errors import ReportedError, UserError, say, short_repr
from marlhf.common.http import event_loop
from marlhf.common.types import Generation
from marlhf.config import RolloutSettings
from marlhf.models.policy import unwrapped
from marlhf.rollout.engine import EngineContext
from marlhf.rollout.vllm_client import Server, ServerError
from marlhf.rollout.vllm_sampling import PolicyFacts, Sampled
from marlhf.rollout.vllm_transfer import TRANSFERS, Named, Transfer

_BUCKET = 256 * 2**20  # bytes of weights that are sent together
# beside sizes, what tells one model's configuration from another's; dropout and such do not
_TELLING = ("model_type", "tie_word_embeddings", "rope_parameters")


class VLLMServers:
    """Samples on servers.

    on_failure   of a server: `stop` the run, or `continue` with the others
    """

    def __init__(
        self,
        addresses: Sequence[str],
        timeout: float,
        on_failure: Literal["stop", "continue"],
        context: EngineContext,
    ) -> None:
        self._facts = PolicyFacts.of(context)
        self._distributed = context.distributed
        self._continues = on_failure == "continue"
        self._servers = [Server(address, timeout) for address in addresses]
        self._transfers: dict[Server, Transfer] = {}
        self._lost: dict[str, str] = {}  # address -> fault
        self._run, self._updates = secrets.token_hex(8), 0
        self._begun: list[Future[list[Sampled]]] = []
        lm = unwrapped(context.distributed.unwrap(context.policy).model)
        for server in self._servers:
            _check(server, lm.config, self._facts.longest)

    # -- samples ---------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: RolloutSettings,
    ) -> Generation:
        """Sample one response per prompt. Raises ReportedError, see `on_failure`."""
        return self.begin(prompts, seeds, settings)()

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: RolloutSettings,
    ) -> Callable[[], Generation]:
        """Start sampling; the returned function waits for the responses."""
        prompts = [list(prompt) for prompt in prompts]
        requests = [
            {"token_ids": prompt, "sampling_params": self._facts.parameters(seed, settings)}
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        work = asyncio.run_coroutine_threadsafe(self._sample(requests), event_loop())
        self._begun = [*(other for other in self._begun if not other.done()), work]

        def responses() -> Generation:
            try:
                return self._facts.generation(prompts, work.result())
            except BaseException:
                work.cancel()
                raise

        return responses

    async def _sample(self, requests: Sequence[dict[str, Any]]) -> list[Sampled]:
        """Responses to requests; what a lost server has not answered, the others do."""
        responses: dict[int, Sampled] = {}
        while missing := [i for i in range(len(requests)) if i not in responses]:
            work = [
                asyncio.ensure_future(self._ask(server, {i: requests[i] for i in share}, responses))
                for server, share in _shares(missing, self._live())
            ]
            try:
                await asyncio.gather(*work)
            finally:
                for part in work:
                    part.cancel()
        return [responses[i] for i in range(len(requests))]

    async def _ask(
        self,
        server: Server,
        requests: dict[int, dict[str, Any]],
        responses: dict[int, Sampled],
    ) -> None:
        """Put a server's answers to requests into `responses`. Raises ReportedError."""
        version = self._version

        def done(i: int, response: Sampled) -> None:
            if {*response.versions} - {version}:
                raise ServerError(
                    server.address,
                    "sampled with other weights than the run's: it was started again, or another "
                    "run uses it",
                )
            responses[i] = response

        try:
            await server.sample_all(requests, done)
        except ServerError as error:
            self._lose(error)

    # -- weights ---------------------------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send the weights to all servers, from the first rank. Raises ReportedError."""
        self._agree()
        self._updates += 1
        fault: list[Exception] = []
        if self._distributed.is_main:
            fault = self._send(self._facts.with_tied(weights))
        else:
            for _ in weights:  # each may be a collective
                pass

        def check() -> None:
            for error in fault:
                raise error

        self._distributed.fail_together(check)
        self._agree()

    def _agree(self) -> None:
        """Share among ranks which servers are lost, and the first rank's name of the run."""
        agreed = self._distributed.gather_objects([(self._run, self._lost)])
        self._run = agreed[0][0]
        for _, lost in agreed:
            self._lost |= lost

    def _send(self, weights: Iterator[tuple[str, Tensor]]) -> list[Exception]:
        """Send weights to the live servers; returns what ends the run, with all weights taken."""
        fault: list[Exception] = []

        def on_all(work: Callable[[Server], None]) -> None:
            """Call `work` for all live servers at a time."""
            if fault:
                return
            live = self._live()
            with ThreadPoolExecutor(len(live)) as threads:
                errors = list(threads.map(partial(_attempt, work), live))
            fault.extend(filter(None, map(self._end_of, errors)))

        on_all(self._begin_update)
        for bucket in _buckets(weights):
            on_all(lambda server, bucket=bucket: self._transfers[server].send(bucket))
        on_all(lambda server: server.finish_update(self._version))
        return fault

    def _end_of(self, error: Exception | None) -> Exception | None:
        """What ends the run after a call of a server raised `error`, if anything does."""
        if not isinstance(error, ServerError):
            return error
        try:
            self._lose(error)
        except ReportedError as end:
            return end
        return None

    def _begin_update(self, server: Server) -> None:
        if server not in self._transfers:
            self._transfers[server] = TRANSFERS[server.backend](server)
        server.begin_update()

    # -- the rest of the contract ----------------------------------------------------------------

    def sleep(self) -> None:
        """No-op: nothing of the servers' is in this process."""

    def close(self) -> None:
        """Leave the servers, which stay up for another run."""
        for work in self._begun:
            work.cancel()
        for server, transfer in self._transfers.items():
            if server.address not in self._lost:
                server.close()
            transfer.close()
        self._transfers = {}

    @property
    def _version(self) -> str:
        """Name of the weights that the servers have."""
        return f"{self._run}-{self._updates}"

    def _live(self) -> list[Server]:
        return [server for server in self._servers if server.address not in self._lost]

    def _lose(self, error: ServerError) -> None:
        """Go on without a server, or raise ReportedError."""
        self._lost[error.address] = error.fault
        others = len(self._live())
        if not self._continues:
            raise ReportedError(
                f"{error}; start it again and resume, or set on_failure: continue in "
                "rollout.engine to go on with the other servers"
            ) from error
        if not others:
            raise ReportedError(f"{error}; it was the last of {len(self._servers)}") from error
        say(f"marlhf: {error}; the run continues with the other {others}")


def _attempt(work: Callable[[Server], Any], server: Server) -> Exception | None:
    """Call `work`; returns its exception."""
    try:
        work(server)
    except Exception as error:
        return error
    return None


def check_servers(addresses: Sequence[str], timeout: float) -> None:
    """Check that servers answer, and were started as a run needs them. Raises UserError."""
    for address in addresses:
        error = _attempt(Server.config, Server(address, timeout))
        if isinstance(error, ServerError):
            raise UserError(f"address: the server {address} {error.fault}")
        if error is not None:
            raise error


def _check(server: Server, lm_config: Any, longest: int) -> None:
    """Check that a server has the policy's model, and room for its sequences. Raises UserError."""
    model = server.config()["model_config"]
    where = f"rollout.engine: the server {server.address}"
    if server.backend not in TRANSFERS:
        raise UserError(
            f"{where} has --weight-transfer-config with backend {server.backend!r}; possible: "
            f"{', '.join(TRANSFERS)}"
        )
    if server.backend == "nccl" and not (torch.cuda.is_available() and find_spec("vllm")):
        raise UserError(
            f"{where} takes weights over nccl, for which the trainer needs a GPU and the package "
            "vllm; marlhf_tcp needs neither"
        )
    if model["max_model_len"] < longest:
        raise UserError(
            f"{where} has max_model_len={model['max_model_len']}, but sequences may have {longest} "
            "tokens (rollout.max_prompt_length + rollout.max_new_tokens, or the model's limit): "
            f"start it with --max-model-len {longest}"
        )
    if difference := _difference(str(model["model"]), lm_config):
        raise UserError(f"{where} has another model, {model['model']!r}: {difference}")


def _difference(path: str, lm_config: Any) -> str | None:
    """First difference of a server's model from the policy, or None.

    path   of the server's model; where it cannot be read from here nothing is compared
    """
    try:
        served = AutoConfig.from_pretrained(
            path, local_files_only=not Path(path).exists(), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError):
        return None
    theirs, ours = (x.get_text_config().to_dict() for x in (served, lm_config))
    for key in sorted(theirs.keys() & ours.keys()):
        is_size = type(theirs[key]) is int and not key.endswith("_token_id")
        if theirs[key] != ours[key] and (is_size or key in _TELLING):
            values = short_repr(theirs[key], 40), short_repr(ours[key], 40)
            return f"{key} {values[0]}, the policy's {values[1]}"
    return None


def _shares(items: Sequence[int], servers: Sequence[Server]) -> list[tuple[Server, Sequence[int]]]:
    """Items dealt to servers, neighbours together: responses to one prompt share its prefix."""
    count = len(servers)
    bounds = [len(items) * i // count for i in range(count + 1)]
    shares = zip(servers, bounds[:-1], bounds[1:], strict=True)
    return [(server, items[a:b]) for server, a, b in shares if b > a]


def _buckets(weights: Iterable[tuple[str, Tensor]]) -> Iterator[Named]:
    """Copies of the weights, in parts of about 256 MiB."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, weight in weights:
        bucket.append((name, weight.detach().clone(memory_format=torch.contiguous_format)))
        size += weight.numel() * weight.element_size()
        if size >= _BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
