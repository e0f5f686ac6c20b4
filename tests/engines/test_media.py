"""Engines that see, hear, draw and speak, against the libraries' own way on the same tiny checkpoints."""

from __future__ import annotations

import io
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import media_models as media
import numpy as np
import pytest
import soundfile
import torch
from asking import ask
from PIL import Image

from runtime.checkpoints.inspect import inspect
from runtime.checkpoints.profile import profile
from runtime.checkpoints.suitability import suitable, this_machine
from runtime.engines import Engine, loader
from runtime.engines.pictures import read_image
from runtime.engines.recordings import read_recording
from runtime.errors import Fatal, RowError, UserError
from runtime.spec import Batch, CallOptions, Message, ModelSpec, Prompt, Task

ENGINES = {
    "vision": ("vision", media.vision),
    "whisper": ("transcription", media.whisper),
    "vits": ("speech", media.vits),
    "stable_diffusion": ("diffusers", media.stable_diffusion),
}
Made = Callable[[str], Path]
Loaded = Callable[[str], Engine]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Folder of a tiny checkpoint, built when first asked for."""
    root = tmp_path_factory.mktemp("media")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else ENGINES[name][1](root / name)

    return folder


@pytest.fixture(scope="module")
def loaded(made: Made) -> Loaded:
    """The engine of a tiny checkpoint, loaded once."""
    engines: dict[str, Engine] = {}

    def engine(name: str) -> Engine:
        if name not in engines:
            kind = ENGINES[name][0]
            engines[name] = loader(kind)(ModelSpec("m", kind, str(made(name))))
        return engines[name]

    return engine


def seen(text: str, *images: bytes) -> Prompt:
    return (Message("user", text, images),)


def heard(sound: bytes) -> Prompt:
    return (Message("user", "", (sound,)),)


def said(**parameters: Any) -> dict[str, Any]:
    return {"extra": tuple(sorted(parameters.items()))}


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("vision", Task.GENERATE),
        ("whisper", Task.TRANSCRIBE),
        ("vits", Task.SPEAK),
        ("stable_diffusion", Task.DRAW),
    ],
)
def test_inspect_knows_media_models_and_their_engines(made: Made, name: str, task: Task) -> None:
    """A checkpoint says what it is made for, and the first engine listed is the one that runs it."""
    found = profile(str(made(name)))
    assert (found.task, found.refusal) == (task, None)
    assert found.parameters == inspect(str(made(name))).num_parameters > 1000
    first = suitable(found, [this_machine()])[0]
    assert (first.engine, first.runs) == (ENGINES[name][0], True)


def test_a_missing_package_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where soundfile is not installed, an engine of sound names it and the extra that brings it."""
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for name in ("speech", "recordings"):
        monkeypatch.delitem(sys.modules, f"runtime.engines.{name}", raising=False)
    with pytest.raises(UserError) as missing:
        loader("speech")
    assert (missing.value.code, missing.value.hint) == ("package_missing", 'pip install "sqlext[speech]"')
    assert "soundfile" in missing.value.message


# -- seeing ------------------------------------------------------------------------------------------------------


def test_a_conversation_about_an_image_equals_the_models_own(made: Made, loaded: Loaded) -> None:
    """Greedy answers equal `generate` on the row alone, in whatever company, with one, two and no images."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(made("vision"))
    model: Any = AutoModelForImageTextToText.from_pretrained(made("vision")).eval()
    first, second = media.picture(1), media.picture(2, format="JPEG")
    prompts = [seen("what is this", first), seen("compare them", first, second), "a list", seen("the dog", second)]
    replies = ask(loaded("vision"), prompts, max_tokens=6)
    for prompt, reply in zip(prompts, replies, strict=True):
        images = [] if isinstance(prompt, str) else [read_image(each) for each in prompt[0].media]
        text = prompt if isinstance(prompt, str) else prompt[0].content
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert reply.output == processor.decode(ids, skip_special_tokens=True)
        assert reply.prompt_tokens == inputs["input_ids"].shape[1]
    assert replies[0].output != ask(loaded("vision"), [seen("what is this", second)], max_tokens=6)[0].output
    counted: Any = loaded("vision")
    assert counted.count_tokens(Batch(1, CallOptions(), prompts)) == [reply.prompt_tokens for reply in replies]


def test_a_seed_decides_a_sampled_answer(loaded: Loaded) -> None:
    """With a seed equal prompts have equal answers, alone and in company; another seed has another one."""
    prompt = seen("what is this", media.picture(1))
    options: dict[str, Any] = {"temperature": 5.0, "max_tokens": 8}
    one, other, alike = ask(loaded("vision"), [prompt, "a list", prompt], seed=3, **options)
    assert one.output == alike.output != other.output
    assert ask(loaded("vision"), [prompt], seed=4, **options)[0].output != one.output


def test_bad_images_fail_alone(loaded: Loaded) -> None:
    """What is no image, what is cut, and a prompt without room are errors of their rows."""
    prompts = [
        seen("x", b"no image"),
        seen("x", media.picture(1)[:200]),
        seen("fox " * 200, media.picture(1)),
        seen("x", media.picture(1)),
    ]
    replies = ask(loaded("vision"), prompts, max_tokens=2)
    codes = [reply.error.code if reply.error else None for reply in replies]
    assert codes == ["image_bad", "image_bad", "prompt_too_long", None]


def test_an_image_of_too_many_pixels_is_not_unfolded() -> None:
    """A small file that claims a huge image is refused by its header."""
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    with pytest.raises(RowError) as refused:
        read_image(file.getvalue())
    assert refused.value.code == "image_too_large"


# -- hearing -----------------------------------------------------------------------------------------------------


def test_a_transcription_equals_the_librarys(made: Made, loaded: Loaded) -> None:
    """Recordings side by side have the text of transformers' pipeline, with its options."""
    from transformers import pipeline

    speech = pipeline("automatic-speech-recognition", model=str(made("whisper")), device="cpu")
    sounds = [media.sound(1), media.sound(2, 0.5), media.sound(3, 2.0)]
    options = {"language": "german", "task": "translate"}
    replies = ask(loaded("whisper"), [heard(each) for each in sounds], max_tokens=8, **said(**options))
    for sound, reply in zip(sounds, replies, strict=True):
        samples = read_recording(sound, media.RATE)
        greedy = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1}  # the pipeline's own default is five beams
        told = speech(samples, generate_kwargs={**options, **greedy})
        assert reply.output == told["text"].strip()
        assert reply.completion_tokens > 0


def test_a_long_recording_is_heard_to_its_end(made: Made, loaded: Loaded) -> None:
    """More than the model hears at once is moved through as Whisper's own long form does."""
    from transformers import AutoProcessor, WhisperForConditionalGeneration

    processor: Any = AutoProcessor.from_pretrained(made("whisper"))
    model: Any = WhisperForConditionalGeneration.from_pretrained(made("whisper")).eval()
    sound = media.sound(3, 2.6)
    features = processor.feature_extractor(
        read_recording(sound, media.RATE),
        sampling_rate=media.RATE,
        truncation=False,
        padding="longest",
        return_attention_mask=True,
        return_tensors="pt",
    )
    ids = model.generate(**features, return_timestamps=True, max_new_tokens=8, do_sample=False)
    reply = ask(loaded("whisper"), [heard(sound)], max_tokens=8)[0]
    assert reply.output == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def test_recordings_come_in_any_rate_and_with_any_channels(loaded: Loaded) -> None:
    """A recording is brought to the model's rate and one channel: it keeps its length and loudness."""
    for rate, kind, channels in ((8_000, "WAV", 1), (44_100, "FLAC", 2), (48_000, "OGG", 1)):
        samples = read_recording(media.sound(1, 0.5, rate, kind, channels), media.RATE)
        assert len(samples) == media.RATE // 2
        assert samples.dtype == np.float32
    times = np.arange(44_100) / 44_100
    file = io.BytesIO()
    soundfile.write(file, np.sin(2 * np.pi * 440 * times), 44_100, format="WAV")
    tone = read_recording(file.getvalue(), media.RATE)[500:-500]
    expected = np.sin(2 * np.pi * 440 * np.arange(media.RATE) / media.RATE)[500:-500]
    assert float(np.abs(tone - expected).max()) < 0.01


def test_timestamps_are_written_when_asked_for(loaded: Loaded) -> None:
    """With timestamps the text says when each part begins and ends."""
    reply = ask(loaded("whisper"), [heard(media.sound(1))], max_tokens=8, **said(timestamps=True))[0]
    assert reply.output.startswith("<|")
    assert "<|" not in ask(loaded("whisper"), [heard(media.sound(1))], max_tokens=8)[0].output


def test_bad_recordings_fail_alone(loaded: Loaded) -> None:
    """What is no recording, an empty one, and a text are errors of their rows."""
    prompts = [heard(b"RIFF...."), heard(media.sound(1, 0.0)), "text", heard(media.sound(1, 0.2))]
    replies = ask(loaded("whisper"), prompts, max_tokens=2)
    codes = [reply.error.code if reply.error else None for reply in replies]
    assert codes == ["recording_bad", "recording_empty", "prompt_bad", None]


# -- drawing -----------------------------------------------------------------------------------------------------


def test_images_equal_the_pipelines(made: Made, loaded: Loaded) -> None:
    """Several images of a call are the pipeline's, pixel by pixel: the one at place n with the seed plus n."""
    from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler

    pipe: Any = DiffusionPipeline.from_pretrained(made("stable_diffusion"))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    options = said(
        sampling_steps=3,
        cfg_scale=4.0,
        batch_size=2,
        batch_count=2,
        negative_prompt="dog",
        sampler_name="euler_a",
        width=24,
        height=16,
    )
    reply = ask(loaded("stable_diffusion"), ["a fox"], seed=7, **options)[0]
    drawn = []
    for part in (0, 2):
        drawn += pipe(
            "a fox",
            negative_prompt="dog",
            num_inference_steps=3,
            guidance_scale=4.0,
            num_images_per_prompt=2,
            width=24,
            height=16,
            generator=[torch.Generator().manual_seed(7 + part + n) for n in range(2)],
        ).images
    images = [read_image(each) for each in reply.output]
    assert [image.size for image in images] == [(24, 16)] * 4
    assert all(np.array_equal(image, own) for image, own in zip(images, drawn, strict=True))
    assert len(set(reply.output)) == 4


def test_a_drawing_hangs_on_its_seed_alone(loaded: Loaded) -> None:
    """The same seed draws the same image in whatever company, no seed draws another one each time."""
    options = said(sampling_steps=2)
    engine = loaded("stable_diffusion")
    one = ask(engine, ["a fox"], seed=1, **options)[0].output
    assert ask(engine, ["a dog", "a fox"], seed=1, **options)[1].output == one
    assert ask(engine, ["a fox"], **options)[0].output != ask(engine, ["a fox"], **options)[0].output


def test_a_drawing_can_begin_with_an_image(loaded: Loaded) -> None:
    """An image to begin with stays the nearer, the smaller the strength."""
    engine = loaded("stable_diffusion")
    begin = media.picture(1, 16, 16)
    prompt = seen("a fox", begin)
    little, much = (
        ask(engine, [prompt], seed=1, **said(sampling_steps=10, strength=strength))[0].output[0]
        for strength in (0.1, 1.0)
    )
    assert read_image(little).size == (16, 16)
    assert little != much
    assert ask(engine, [seen("a fox", b"bad")], seed=1)[0].error.code == "image_bad"  # type: ignore[union-attr]


def test_parameters_of_a_drawing_are_checked(loaded: Loaded) -> None:
    """A misspelt parameter, an unknown sampler, a wrong size and too many images end the statement with their names."""
    for parameters, word in (
        ({"sampling_step": 3}, "sampling_steps"),
        ({"sampler_name": "eulers"}, "sampler_name"),
        ({"width": 5000}, "width"),
        ({"batch_size": 65}, "batch_size"),
        ({"sampling_steps": 2000}, "diffusers refuses"),
    ):
        with pytest.raises(Fatal) as refused:
            ask(loaded("stable_diffusion"), ["a fox"], seed=1, **said(**parameters))
        assert word in str(refused.value)


def test_a_stopped_drawing_ends_soon(loaded: Loaded) -> None:
    """Many steps are left out once nobody wants the image, and nothing comes."""
    stop = threading.Event()
    engine = loaded("stable_diffusion")
    threading.Timer(0.3, stop.set).start()
    pieces = list(engine.run(Batch(1, CallOptions(seed=1, **said(sampling_steps=900)), ["a fox"] * 50), stop))
    assert len(pieces) < 50


@pytest.mark.parametrize(
    ("part", "code"),
    [
        (["os", "path"], "checkpoint_remote_code"),
        (["diffusers_modules", "UNet2DConditionModel"], "checkpoint_remote_code"),
    ],
)
def test_a_pipeline_with_foreign_parts_is_refused(made: Made, tmp_path: Path, part: list[str], code: str) -> None:
    """A part is a class of diffusers or transformers, or the folder is not loaded."""
    folder = tmp_path / "copy"
    shutil.copytree(made("stable_diffusion"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": part}))
    with pytest.raises(UserError) as refused:
        inspect(str(folder))
    assert refused.value.code == code


def test_pickled_parts_of_a_pipeline_are_refused(made: Made, tmp_path: Path) -> None:
    """A part that has only pickled weights is not loaded."""
    folder = tmp_path / "copy"
    shutil.copytree(made("stable_diffusion"), folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError) as refused:
        inspect(str(folder))
    assert refused.value.code == "checkpoint_pickled"


# -- speaking ----------------------------------------------------------------------------------------------------


def test_speech_equals_the_models_own(made: Made, loaded: Loaded) -> None:
    """With a seed the recording has the samples that the model gives after that seed, at its rate."""
    from transformers import AutoTokenizer, VitsModel

    tokenizer: Any = AutoTokenizer.from_pretrained(made("vits"))
    model: Any = VitsModel.from_pretrained(made("vits")).eval()
    reply = ask(loaded("vits"), ["the quick fox", "hello"], seed=11, **said(speaker=1))[0]
    torch.manual_seed(11)
    with torch.inference_mode():
        own = model(**tokenizer(["the quick fox"], return_tensors="pt"), speaker_id=1).waveform[0].numpy()
    samples, rate = soundfile.read(io.BytesIO(reply.output), dtype="float32")
    assert rate == media.RATE
    assert np.allclose(samples, own.clip(-1, 1), atol=1e-4)


def test_faster_speech_is_shorter(loaded: Loaded) -> None:
    """speaking_rate 2 takes about half as long, and leaves the next call as it was."""
    engine = loaded("vits")

    def seconds(**parameters: Any) -> float:
        return soundfile.info(
            io.BytesIO(ask(engine, ["the quick brown fox"], seed=1, **said(**parameters))[0].output)
        ).duration

    usual = seconds()
    assert seconds(speaking_rate=2.0) < 0.8 * usual
    assert seconds() == usual


def test_what_cannot_be_said_fails_alone(loaded: Loaded) -> None:
    """An empty text is an error of its row; a speaker that is not there ends the statement."""
    replies = ask(loaded("vits"), ["", "a", "  "], seed=1)
    assert [reply.error.code if reply.error else None for reply in replies] == ["prompt_bad", None, "prompt_bad"]
    with pytest.raises(Fatal) as refused:
        ask(loaded("vits"), ["a"], seed=1, **said(speaker=2))
    assert "speaker" in str(refused.value)
