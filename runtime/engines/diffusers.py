"""Images drawn from texts: any text to image pipeline of diffusers.

Alone because images come out, several of a call. Rows are drawn one after the other, as an image costs far more than
what they could share; the images of one row run side by side.
"""

from __future__ import annotations

import inspect as signatures
import threading
import time
from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging

from runtime.checkpoints.inspect import inspect
from runtime.engines.loading import device_memory, engine_options, free_memory, loading, place
from runtime.engines.microbatch import failed, texts_of
from runtime.engines.parameters import bad_value, count, read_parameters
from runtime.engines.pictures import png, read_image
from runtime.errors import Fatal, RowError, UserError
from runtime.spec import Answers, Batch, CallOptions, EngineInfo, ModelSpec, Prompt, Task

OPTIONS = ("dtype",)
BATCH_ROWS = 4
MAX_BATCH_BYTES = 64 << 20
MAX_SIDE = 4096
MAX_IMAGES = 64  # of one call
STRENGTH = 0.5  # how far an image may be left behind, when nothing is said

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unipc": ("UniPCMultistepScheduler", {}),
    "unpic": ("UniPCMultistepScheduler", {}),  # as Byzer-LLM spells it
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "heun_karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
}
"""Byzer-LLM's names of diffusers' schedulers."""


def _side(value: Any) -> int:
    side = count(value)
    if side > MAX_SIDE:
        raise ValueError
    return side


def _share(value: Any) -> float:
    share = float(value)
    if not 0 < share <= 1:
        raise ValueError
    return share


_PARAMETERS: dict[str, Any] = {
    "negative_prompt": str,
    "sampler_name": str,
    "sampling_steps": count,
    "batch_size": count,
    "batch_count": count,
    "cfg_scale": float,
    "width": _side,
    "height": _side,
    "strength": _share,
}
_WANTED = {
    count: "a whole number, at least 1",
    _side: f"pixels from 1 to {MAX_SIDE}",
    _share: "above 0 and at most 1",
}
_ARGUMENTS = {"sampling_steps": "num_inference_steps", "cfg_scale": "guidance_scale"}
_OF_THE_PIPELINE = ("negative_prompt", "sampling_steps", "cfg_scale", "width", "height")


class DiffusersEngine:
    """A pipeline that draws texts.

    Args:
        pipe: of diffusers, on its device.
        redraw: its sibling that begins with an image; None where it has none.
        info: what was loaded.
    """

    def __init__(self, pipe: Any, redraw: Any, info: EngineInfo) -> None:
        self.info = info
        self._pipe = pipe
        self._redraw = redraw
        self._usual = pipe.scheduler
        self._drawing = threading.Lock()  # a pipeline keeps the state of a drawing in itself

    def run(self, batch: Batch, stop: threading.Event) -> Iterator[Answers]:
        """PNG images of each text. The image at place n of a row is drawn with the seed plus n.

        Raises:
            OutOfMemory: the images that are drawn at once do not fit.
            Fatal: a parameter is unknown, or nothing the pipeline knows.
        """
        begun = time.perf_counter()
        said = self._said(batch.options)
        texts, errors = texts_of(batch)
        if errors:
            yield failed(errors, (time.perf_counter() - begun) * 1000.0)
        for row, text in texts.items():
            try:
                with self._drawing:
                    images = self._draw(text, _given(batch.prompts[row]), said, batch.options.seed, stop)
            except RowError as error:
                yield failed({row: error.info}, (time.perf_counter() - begun) * 1000.0)
                continue
            if stop.is_set():
                return
            tokens, cut = self._tokens(text)
            latency_ms = (time.perf_counter() - begun) * 1000.0
            yield Answers([row], [images], ["length" if cut else "stop"], [tokens], [0], latency_ms)

    def count_tokens(self, batch: Batch) -> list[int]:
        """Tokens that the pipeline reads of each text."""
        texts, _ = texts_of(batch)
        return [self._tokens(texts[row])[0] if row in texts else 0 for row in range(len(batch.prompts))]

    def close(self) -> None:
        """Give back the memory."""
        self._pipe = self._redraw = self._usual = None
        free_memory()

    def _said(self, options: CallOptions) -> dict[str, Any]:
        """The parameters of a call."""
        said = read_parameters(options.extra, _PARAMETERS, _WANTED)
        for side, other in (("width", "height"), ("height", "width")):
            if side in said:
                said.setdefault(other, said[side])  # pipelines forget a side that is said alone
        known = signatures.signature(self._pipe.__call__).parameters
        for name in _OF_THE_PIPELINE:
            if name in said and _ARGUMENTS.get(name, name) not in known:
                raise bad_value(name, f"left out: {type(self._pipe).__name__} has none")
        if said.get("batch_size", 1) * said.get("batch_count", 1) > MAX_IMAGES:
            raise bad_value("batch_size", f"such that a call draws at most {MAX_IMAGES} images")
        if (sampler := said.get("sampler_name")) is not None and sampler.lower() not in SAMPLERS:
            raise bad_value("sampler_name", f"one of {', '.join(SAMPLERS)}")
        return said

    def _draw(
        self, text: str, given: bytes | None, said: dict[str, Any], seed: int | None, stop: threading.Event
    ) -> tuple[bytes, ...]:
        """The images of a row; whatever, once `stop` is set."""
        pipe = self._pipe
        arguments = {_ARGUMENTS.get(name, name): said[name] for name in _OF_THE_PIPELINE if name in said}
        if given is not None:
            pipe = self._redraw
            arguments |= {"image": self._resized(given, said), "strength": said.get("strength", STRENGTH)}
            arguments = {name: value for name, value in arguments.items() if name not in ("width", "height")}
        pipe.scheduler = self._scheduler(said.get("sampler_name"))
        size = said.get("batch_size", 1)
        images: list[bytes] = []
        for part in range(said.get("batch_count", 1)):
            generators = [_generator(seed, part * size + place) for place in range(size)]
            with device_memory(), torch.inference_mode():
                images += self._part(pipe, text, {**arguments, "num_images_per_prompt": size}, generators, stop)
            if stop.is_set():
                break
        return tuple(images)

    def _part(
        self,
        pipe: Any,
        text: str,
        arguments: dict[str, Any],
        generators: list[torch.Generator],
        stop: threading.Event,
    ) -> list[bytes]:
        def watch(pipe: Any, step: int, at: Any, kept: dict[str, Any]) -> dict[str, Any]:
            if stop.is_set():
                pipe._interrupt = True  # the pipeline's own way to leave its steps out
            return kept

        if "callback_on_step_end" in signatures.signature(pipe.__call__).parameters:
            arguments = {**arguments, "callback_on_step_end": watch}
        try:
            drawn = pipe(prompt=text, generator=generators, **arguments)
        except (ValueError, TypeError, IndexError) as error:  # the last: more steps than its scheduler has
            reason = str(error).splitlines()[0] if text not in str(error) else type(error).__name__
            raise Fatal(f"diffusers refuses the call: {reason[:200]}", code="option_value") from None
        if any(getattr(drawn, "nsfw_content_detected", None) or ()):
            raise RowError("The safety checker of the checkpoint held an image back.", code="content_filter")
        return [png(image) for image in drawn.images]

    def _resized(self, given: bytes, said: dict[str, Any]) -> Any:
        image = read_image(given)
        wanted = said.get("width", image.width), said.get("height", image.height)
        if max(wanted) > MAX_SIDE:
            raise RowError(
                f"The image is {image.width} × {image.height}; at most {MAX_SIDE} pixels of a side are drawn.",
                code="image_too_large",
                hint="Say width := … and height := ….",
            )
        return image if image.size == wanted else image.resize(wanted)

    def _scheduler(self, name: str | None) -> Any:
        if name is None:
            return self._usual
        kind, settings = SAMPLERS[name.lower()]
        if not hasattr(self._usual.config, "beta_start"):
            raise bad_value("sampler_name", f"left out: it is not for models of {type(self._usual).__name__}")
        return getattr(diffusers, kind).from_config(self._usual.config, **settings)

    def _tokens(self, text: str) -> tuple[int, bool]:
        """Tokens that are read of a text, and whether it has more."""
        tokenizer = getattr(self._pipe, "tokenizer", None)
        if tokenizer is None:
            return 0, False
        count = len(tokenizer(text, verbose=False)["input_ids"])
        return min(count, tokenizer.model_max_length), count > tokenizer.model_max_length


def _given(prompt: Prompt) -> bytes | None:
    """The image to begin with."""
    media = [] if isinstance(prompt, str) else [media for turn in prompt for media in turn.media]
    if len(media) > 1:
        raise RowError("A drawing begins with one image.", code="prompt_bad")
    return media[0] if media else None


def _generator(seed: int | None, place: int) -> torch.Generator:
    """Random numbers for one image, the same on every device."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed((seed + place) % (1 << 63))
    return generator


def load(spec: ModelSpec) -> DiffusersEngine:
    """Load the pipeline in `spec.path`: safetensors only, classes of diffusers and transformers only.

    Option: dtype.

    Raises:
        UserError: the folder or an option is wrong.
        DeployError: the pipeline did not load.
    """
    options = engine_options(spec, OPTIONS)
    checkpoint = inspect(spec.path, Task.DRAW)
    placement = place(checkpoint, options.get("dtype"))
    diffusers_logging.set_verbosity_error()  # what matters comes as an error
    diffusers_logging.disable_progress_bar()
    with loading(checkpoint):
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            checkpoint.path, dtype=placement.dtype, use_safetensors=True, local_files_only=True
        ).to(placement.device)
    pipe.set_progress_bar_config(disable=True)
    redraw = _redrawing(pipe)
    info = EngineInfo(
        engine="diffusers",
        task=Task.DRAW,
        device=str(placement.device),
        dtype=placement.dtype_name,
        max_batch_rows=BATCH_ROWS,
        max_batch_chars=MAX_BATCH_BYTES,
        architectures=checkpoint.architectures,
        images=redraw is not None,
        notes=placement.notes,
    )
    engine = DiffusersEngine(pipe, redraw, info)
    try:
        engine._said(spec.defaults)
    except Fatal as error:  # a wrong default fails the deployment, not its rows
        raise UserError(error.message, code=error.code, hint=error.hint) from None
    return engine


def _redrawing(pipe: Any) -> Any:
    """The pipeline of the same parts that begins with an image, or None."""
    try:
        sibling = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    except (ValueError, TypeError):
        return None
    sibling.set_progress_bar_config(disable=True)
    return sibling
