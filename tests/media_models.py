"""Builders of tiny real checkpoints of media models: random weights from a fixed seed, seconds at most to run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import models

VISION_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RATE = 16_000


def reranker(folder: Path) -> Path:
    """A BERT with one label without a name, as cross-encoders are published."""
    return models.classifier(folder, seed=3, labels=("LABEL_0",))


def cross_encoder(folder: Path, *, activation: Any = None) -> Path:
    """The same as sentence-transformers saves it."""
    from sentence_transformers import CrossEncoder

    CrossEncoder(str(reranker(folder / "body")), device="cpu", activation_fn=activation).save(str(folder / "whole"))
    return folder / "whole"


def vision(folder: Path) -> Path:
    """A LLaVA that sees images of 32 pixels as four patches."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = models.text_tokenizer(None)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    eyes = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
        projection_dim=32,
        initializer_range=0.3,
    )
    config = LlavaConfig(
        vision_config=eyes,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VISION_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def whisper(folder: Path) -> Path:
    """A Whisper that hears 2 seconds at once, knows English and German, and writes at most 16 tokens of them."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    vocab = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nocaptions|>", "<|notimestamps|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = WhisperTokenizer.from_pretrained(
        folder, eos_token=special[0], bos_token=special[0], unk_token=special[0]
    )
    tokenizer.add_tokens(special, special_tokens=True)
    times = [f"<|{number * 0.02:.2f}|>" for number in range(101)]
    tokenizer.add_tokens(times)
    id_of = tokenizer.convert_tokens_to_ids
    torch.manual_seed(5)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=100,
        max_target_positions=64,
        init_std=0.3,
        decoder_start_token_id=id_of("<|startoftranscript|>"),
        bos_token_id=id_of("<|endoftext|>"),
        eos_token_id=id_of("<|endoftext|>"),
        pad_token_id=id_of("<|endoftext|>"),
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        max_length=20,
        is_multilingual=True,
        lang_to_id={"<|en|>": id_of("<|en|>"), "<|de|>": id_of("<|de|>")},
        task_to_id={"transcribe": id_of("<|transcribe|>"), "translate": id_of("<|translate|>")},
        no_timestamps_token_id=id_of("<|notimestamps|>"),
        prev_sot_token_id=id_of("<|startofprev|>"),
        max_initial_timestamp_index=50,
        return_timestamps=False,
    )
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=80, chunk_length=2), tokenizer).save_pretrained(folder)
    return folder


def vits(folder: Path) -> Path:
    """A VITS of two speakers, 16,000 samples a second, that reads letters."""
    import torch
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    folder.mkdir(parents=True)
    letters = ["_", *"abcdefghijklmnopqrstuvwxyz ", "<unk>"]
    (folder / "vocab.json").write_text(json.dumps({letter: n for n, letter in enumerate(letters)}), encoding="utf-8")
    tokenizer = VitsTokenizer(
        str(folder / "vocab.json"), pad_token="_", unk_token="<unk>", phonemize=False, is_uroman=False
    )
    torch.manual_seed(0)
    config = VitsConfig(
        vocab_size=len(letters),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=32,
        flow_size=16,
        spectrogram_bins=65,
        upsample_initial_channel=16,
        upsample_rates=[8, 8],
        upsample_kernel_sizes=[16, 16],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=1,
        posterior_encoder_num_wavenet_layers=1,
        duration_predictor_num_flows=1,
        depth_separable_num_layers=1,
        num_speakers=2,
        speaker_embedding_size=4,
        sampling_rate=RATE,
    )
    VitsModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stable_diffusion(folder: Path) -> Path:
    """A Stable Diffusion that draws 16 pixels, in some milliseconds a step."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = models.text_tokenizer(None)
    tokenizer.model_max_length = 16
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    vae = AutoencoderKL(
        block_out_channels=[4, 8],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 40, height: int = 32, format: str = "PNG") -> bytes:
    """An image file of random pixels."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def sound(seed: int, seconds: float = 1.0, rate: int = RATE, format: str = "WAV", channels: int = 1) -> bytes:
    """A sound file of noise."""
    import numpy as np
    import soundfile

    samples = np.random.default_rng(seed).normal(0, 0.1, (int(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format)
    return file.getvalue()
