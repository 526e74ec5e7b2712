"""What people see of a plan: memory, price, scale to zero with its bars, and the market. To stdout, in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from service.boots.groups import shortened
from service.cli.terminal import print_json, results_console
from service.planning.fit import Verdict
from service.planning.prices import CORES, MEMORY_GIB, VOLUME_FREE_GIB, volume_per_month
from service.planning.ranges import Range
from service.planning.report import Answer

_BARS = " ▏▎▍▌▋▊▉█"
_BAR_WIDTH = 20
_WIDTH = 80


def show(answer: Answer, as_json: bool) -> None:
    """Print the answer."""
    if as_json:
        print_json(answer.as_object())
        return
    console = results_console()
    for line in _lines(answer):
        for part in textwrap.wrap(line, _WIDTH, drop_whitespace=False) or [""]:
            console.print(part.rstrip(), markup=False)


def _lines(answer: Answer) -> Iterator[str]:
    yield from _verdict(answer)
    yield ""
    yield from _memory(answer)
    yield ""
    yield from _price(answer)
    if answer.fit.verdict is Verdict.DOES_NOT_FIT:
        return
    yield ""
    yield from _windows(answer)
    yield ""
    yield from _loads(answer)


def _verdict(answer: Answer) -> Iterator[str]:
    fitted = answer.fit
    key, where = shortened(fitted.model.spec.key, 36), fitted.tier.label
    says = {
        Verdict.FITS: "fits",
        Verdict.MAY_FIT: "may fit: it depends on memory that only a boot measures",
        Verdict.DOES_NOT_FIT: "does not fit",
    }[fitted.verdict]
    yield f"{key} on {where}, {fitted.max_model_len:,} tokens of context: {says}."
    if fitted.why_refused:
        yield fitted.why_refused
    if fitted.verdict is Verdict.FITS:
        return
    if not answer.changes:
        yield "No single container of Modal's holds it. Choose a smaller model."
        return
    yield "What makes it fit, nearest first:"
    for change in answer.changes:
        yield f"  {change.text} (${change.dollars_per_hour:.2f} an hour)"


def _memory(answer: Answer) -> Iterator[str]:
    fitted = answer.fit
    yield f"{'GB of each GPU' if fitted.tier.n_gpu > 1 else 'GB of the GPU':<22} calculated; no GPU was measured"
    yield f"{'vLLM uses':<22} {_gb(fitted.memory)}"
    for name, part in fitted.parts.items():
        yield f"  {name:<20} {_gb(part)}"
    left = fitted.kv_bytes
    short = left.high <= 0
    yield f"  {'missing' if short else 'KV cache':<20} {_gb(Range(-left.high, -left.low) if short else left)}"
    dtype = f", {fitted.kv_cache_dtype}" if fitted.kv_cache_dtype else ""
    whole = _figure(fitted.cache.request_bytes(fitted.max_model_len) / 1e9)
    yield f"{'a request takes':<22} {fitted.cache.token_bytes:,.0f} bytes a token{dtype}; {whole} GB at full length"
    if fitted.verdict is Verdict.DOES_NOT_FIT:
        return
    yield f"{'tokens in the cache':<22} {_span(fitted.tokens)}"
    full, typical = fitted.sequences(fitted.max_model_len), fitted.sequences(answer.question.tokens)
    yield f"{'requests at once':<22} {_span(full)} of {fitted.max_model_len:,} tokens"
    yield f"{'':<22} {_span(typical)} of {answer.question.tokens:,} tokens"


def _price(answer: Answer) -> Iterator[str]:
    hourly, fitted = answer.hourly, answer.fit
    yield f"{'$ an hour':<22} {_span(hourly.total, 2)}; {answer.prices.source}"
    yield f"  {'GPUs':<20} {hourly.gpus:.2f}"
    yield f"  {'CPU':<20} {_span(hourly.cpu, 2)} for {_span(CORES)} cores, assumed"
    yield f"  {'memory':<20} {_span(hourly.memory, 2)} for {_span(MEMORY_GIB)} GiB, assumed"
    if hourly.surcharge != 1:
        yield f"  {'region':<20} all of it x {hourly.surcharge:g}"
    monthly = volume_per_month(fitted.model.weights_bytes)
    yield f"{'$ a month':<22} {monthly:.2f} for the volume, beyond {VOLUME_FREE_GIB:,} GiB that are free"
    if other := answer.cheapest:
        yield f"{'cheapest that fits':<22} {other.tier.label}, ${answer.gpu_price(other.tier):.2f} an hour for the GPUs"


def _windows(answer: Answer) -> Iterator[str]:
    traffic, current = answer.traffic, answer.question.settings.scaledown_window
    if not answer.windows:
        yield (
            f"{_rate(traffic.requests_per_hour)} requests an hour of {traffic.request_s:g} s take "
            f"{answer.replica.count(traffic)} replicas, which no scaledown window ends: "
            f"${answer.replica.dollars_per_day(traffic):,.2f} a day."
        )
        return
    yield (
        f"Scale to zero with {_rate(traffic.requests_per_hour)} requests an hour of {traffic.request_s:g} s, at "
        f"random; a boot takes {traffic.boot_s:.0f} s ({answer.boot_source}). * is SERVICE_SCALEDOWN_WINDOW."
    )
    outcomes = {window: answer.dollars_per_day(outcome) for window, outcome in answer.windows.items()}
    most = max(outcomes.values()) or 1.0
    yield f"{'window':<9}{'$/day':>8}  {'':<{_BAR_WIDTH}}{'cold':>6}  {'':<{_BAR_WIDTH}}{'mean wait':>11}"
    for window, outcome in answer.windows.items():
        name = f"{_duration(window)}{' *' if window == current else ''}"
        dollars = outcomes[window]
        yield (
            f"{name:<9}{dollars:>8.2f}  {_bar(dollars / most)}{outcome.cold_share:>6.0%}  {_bar(outcome.cold_share)}"
            f"{outcome.mean_wait_s:>9.1f} s"
        ).rstrip()
    always = 24 * answer.replica.dollars_per_hour
    yield f"Always up (SERVICE_MIN_CONTAINERS=1): ${always:.2f} a day."


def _loads(answer: Answer) -> Iterator[str]:
    question, market = answer.question, answer.question.market_per_million
    yield (
        f"Tokens at a window of {_duration(question.settings.scaledown_window)}, {question.tokens_in:,} of prompt and "
        f"{question.tokens_out:,} of answer a request:"
    )
    yield f"{'requests/h':>10}{'$/day':>12}{'$/1M tokens':>14}" + (f"{'market':>10}" if market else "")
    for load in answer.loads:
        line = f"{_rate(load.requests_per_hour):>10}{load.dollars_per_day:>12,.2f}{load.dollars_per_million:>14,.2f}"
        if market:
            line += f"{market:>10,.3f}  {'loses' if load.dollars_per_million > market else 'pays'}"
        yield line
    carried = answer.replica.capacity(answer.traffic)
    yield (
        f"One replica carries {carried:,.0f} requests an hour: {answer.replica.slots:.0f} at once, "
        f"{answer.traffic.request_s:g} s each; SERVICE_MAX_CONTAINERS allows more."
    )
    if market:
        yield _market(answer, market)


def _market(answer: Answer, market: float) -> str:
    if answer.break_even is None or answer.second_break_even is None:
        return f"Self-hosting loses at every load: the market's price is ${market:.3f} for 1M tokens."
    carried = answer.replica.capacity(answer.traffic)
    loses = f"loses below {answer.break_even:,.0f} requests an hour, " if answer.break_even else ""
    if answer.second_break_even > carried:
        return (
            f"Self-hosting {loses}{'and ' if loses else ''}pays up to the {carried:,.0f} requests an hour of one "
            f"replica; with a second one it pays from {answer.second_break_even:,.0f}."
        )
    if not loses:
        return f"Self-hosting pays at every load: the market's price is ${market:.3f} for 1M tokens."
    return f"Self-hosting {loses}and pays above."


def _bar(share: float) -> str:
    eighths = round(min(max(share, 0.0), 1.0) * _BAR_WIDTH * 8)
    bar = "█" * (eighths // 8) + (_BARS[eighths % 8] if eighths % 8 else "")
    return f"{bar:<{_BAR_WIDTH}}"


def _gb(value: Range) -> str:
    return _span(Range(value.low / 1e9, value.high / 1e9), 1)


def _span(value: Range, digits: int | None = None) -> str:
    low, high = (_figure(end) if digits is None else f"{end:.{digits}f}" for end in value)
    return low if low == high else f"{low} to {high}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _duration(seconds: int) -> str:
    return f"{seconds} s" if seconds < 60 or seconds % 60 else f"{seconds // 60} min"
