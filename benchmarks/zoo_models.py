"""What lives in the zoo: models of other libraries from small configurations, random weights, no network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Animal:
    """A model and its input.

    Attributes:
        name: the family, and the model.
        make, x: the model; two samples, a tensor, a tuple of arguments or a dict of keyword arguments.
        source, wrt: as GeometryProbe takes them.
        transform: what maps the model's output to what is measured of it.
    """

    name: str
    make: Callable[[], nn.Module]
    x: Callable[[], Any]
    source: str | None = None
    wrt: str | None = None
    transform: Callable[[Any], Any] | None = None

    def place(self, x: Any) -> Tensor:
        """The input that the metric lives on."""
        if self.wrt is not None:
            return x[self.wrt]
        return next(t for t in tree_leaves(x) if isinstance(t, Tensor) and t.is_floating_point())


def _image(size: int, channels: int = 3, *more: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, channels, size, size, *more)


def _first(output: Any) -> Tensor:
    """What a model is asked for first: the logits, else the last hidden state, else the first tensor."""
    for name in ("logits", "last_hidden_state", "sample", "logits_per_image"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return next(t for t in tree_leaves(output) if isinstance(t, Tensor))


#: One for each file of timm.models: the model, the size of its image, and fewer blocks for the large ones.
TIMM = """\
beit beit_base_patch16_224 64 depth=2
byoanet lambda_resnet26rpt_256 64
byobnet gernet_s 64
cait cait_xxs24_224 64 depth=4
coat coat_tiny 64
convit convit_tiny 64
convmixer convmixer_768_32 64
convnext convnext_atto 64
cpubone cpubone_nano 64
crossvit crossvit_tiny_240 240
csatv2 csatv2 64
cspnet cs3darknet_focus_s 64
cspnext cspnext_tiny 64
davit davit_tiny 64
deepseek_vit deepseek_vit_412m 56 depth=2
deit deit_tiny_patch16_224 64
densenet densenet121 64
dla dla34 64
dpn dpn68 64
edgenext edgenext_xx_small 64
efficientformer efficientformer_l1 224
efficientformer_v2 efficientformerv2_s0 224
efficientnet tinynet_d 64
efficientvim efficientvim_m1 64
efficientvit_mit efficientvit_b0 64
efficientvit_msra efficientvit_m0 64
eva eva02_tiny_patch14_224 64
fasternet fasternet_t0 64
fastvit fastvit_t8 64
focalnet focalnet_tiny_srf 64
gcvit gcvit_xxtiny 224
gemma4_vit gemma4_vit_167m_enc 96 depth=2
ghostnet ghostnet_050 64
hardcorenas hardcorenas_b 64
hgnet hgnetv2_b0 64
hiera hiera_tiny_224 64
hieradet_sam2 sam2_hiera_tiny 64
hrnet hrnet_w18_small 64
iformer iformer_t 64
inception_next inception_next_atto 64
inception_resnet_v2 inception_resnet_v2 96
inception_v3 inception_v3 96
inception_v4 inception_v4 96
lcnetv2 lcnetv2_small 64
levit levit_128 224
lowformer lowformer_b0 64
mambaout mambaout_tiny 64
maxxvit maxvit_pico_rw_256 64
metaformer caformer_s18 64
mlp_mixer gmixer_12_224 64
mobilenetv3 mobilenetv3_small_050 64
mobilenetv5 mobilenetv5_base 64
mobilevit mobilevit_xxs 64
mvitv2 mvitv2_tiny 64
naflexvit naflexvit_base_patch16_gap 64 depth=2
nasnet nasnetalarge 64
nest nest_tiny 64
nextvit nextvit_small 64
nfnet nfnet_l0 64
pit pit_ti_224 64
pnasnet pnasnet5large 64
pvt_v2 pvt_v2_b0 64
qwen3_vit qwen3_vit_88m 64 depth=2
rdnet rdnet_tiny 64
regnet regnetx_002 64
repghost repghostnet_050 64
repvit repvit_m0_9 64
res2net res2net50_14w_8s 64
resnest resnest14d 64
resnet resnet18 64
resnetv2 resnetv2_18 64
rexnet rexnetr_100 64
selecsls selecsls42 64
senet legacy_seresnet18 64
sequencer sequencer2d_s 64
shvit shvit_s1 64
sknet skresnet18 64
starnet starnet_s050 64
swiftformer swiftformer_xs 64
swin_transformer swin_tiny_patch4_window7_224 64
swin_transformer_v2 swinv2_tiny_window8_256 64
swin_transformer_v2_cr swinv2_cr_tiny_ns_224 64
tiny_vit tiny_vit_5m_224 64
tnt tnt_s_legacy_patch16_224 64
tresnet tresnet_m 64
twins twins_svt_small 64
vgg vgg11 64
visformer visformer_tiny 64
vision_transformer vit_tiny_patch16_224 64
vision_transformer_hybrid vit_tiny_r_s16_p8_224 64
vision_transformer_relpos vit_relpos_small_patch16_224 64 depth=3
vision_transformer_sam samvit_base_patch16_224 64 depth=2
vitamin vitamin_small_224 64
volo volo_d1_224 64
vovnet ese_vovnet19b_slim_dw 64
xception legacy_xception 64
xception_aligned xception41 64
xcit xcit_nano_12_p8_224 64
"""


def timm() -> Iterator[Animal]:
    import timm as library

    def made(name: str, size: int, options: dict[str, int]) -> nn.Module:
        try:
            return library.create_model(name, img_size=size, **options)
        except TypeError:  # a convolutional one takes every size
            return library.create_model(name, **options)

    for line in TIMM.splitlines():
        family, name, size, *fewer = line.split()
        options = {option: int(value) for option, _, value in (pair.partition("=") for pair in fewer)}
        yield Animal(f"{family}: {name}", functools.partial(made, name, int(size), options), _image(int(size)))


def torchvision() -> Iterator[Animal]:
    from torchvision import models

    sizes = {"alexnet": 64, "squeezenet1_0": 64, "googlenet": 64, "inception_v3": 96, "maxvit_t": 224}
    options: dict[str, dict[str, Any]] = {
        "vit_b_32": {"image_size": 64},
        "googlenet": {"aux_logits": False, "init_weights": False},
        "inception_v3": {"aux_logits": False, "init_weights": False},
        "deeplabv3_mobilenet_v3_large": {"weights_backbone": None},
        "fcn_resnet50": {"weights_backbone": None},
        "lraspp_mobilenet_v3_large": {"weights_backbone": None},
        "deeplabv3_resnet50": {"weights_backbone": None},
    }
    images = (
        "alexnet convnext_tiny deeplabv3_mobilenet_v3_large deeplabv3_resnet50 densenet121 efficientnet_b0 "
        "efficientnet_v2_s fcn_resnet50 googlenet inception_v3 lraspp_mobilenet_v3_large maxvit_t mnasnet0_5 "
        "mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 "
        "squeezenet1_0 swin_t swin_v2_t vgg11 vgg11_bn vit_b_32"
    )
    make = functools.partial(models.get_model, weights=None)
    for name in images.split():
        yield Animal(name, functools.partial(make, name, **options.get(name, {})), _image(sizes.get(name, 64)))
    for name in ("mc3_18", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t", "mvit_v2_s"):
        frames, size = {"s3d": (16, 224), "mvit_v2_s": (16, 224)}.get(name, (8, 32))
        yield Animal(
            name,
            functools.partial(make, name, **options.get(name, {})),
            lambda frames=frames, size=size: torch.randn(2, 3, frames, size, size),  # type: ignore[misc]
        )
    yield Animal(
        "raft_small", lambda: _Last(models.get_model("raft_small")), lambda: torch.randn(2, 3, 128, 128).tanh()
    )


class _Last(nn.Module):
    """Optical flow from a picture to its mirror image, after two steps."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow(x, x.flip(3), num_flow_updates=2)[-1]


def transformers() -> Iterator[Animal]:
    import transformers as library

    library.logging.set_verbosity_error()
    small = {
        "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "pad_token_id": 0,
    }  # fmt: skip
    few = {**small, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
    moe = {**few, "num_local_experts": 3, "num_experts_per_tok": 2}
    experts = {**few, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    t5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    bart = {
        "vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 40,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    }  # fmt: skip
    gpt = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "n_ctx": 40}
    image = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    speech = {
        **{k: v for k, v in image.items() if k not in ("image_size", "patch_size")}, "vocab_size": 20,
        "conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [8, 4], "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip
    stages = {"num_channels": 3, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]}

    def made(kind: str, config: str, options: dict[str, Any]) -> nn.Module:
        return getattr(library, kind)(getattr(library, config)(**options))

    def animal(kind: str, config: str, options: dict[str, Any], x: Callable[[], Any], **more: Any) -> Animal:
        return Animal(kind, functools.partial(made, kind, config, options), x, transform=_first, **more)

    def tokens(length: int = 7) -> Tensor:
        return torch.randint(3, 60, (2, length))

    word, embed, wte = "embeddings.word_embeddings", "model.embed_tokens", "transformer.wte"
    texts: list[tuple[str, str, dict[str, Any], str]] = [
        ("BertModel", "BertConfig", small, word),
        ("BertForSequenceClassification", "BertConfig", small, f"bert.{word}"),
        ("RobertaModel", "RobertaConfig", small, word),
        ("XLMRobertaModel", "XLMRobertaConfig", small, word),
        ("DistilBertModel", "DistilBertConfig", {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}, word),
        ("AlbertModel", "AlbertConfig", {**small, "embedding_size": 8}, word),
        ("ElectraModel", "ElectraConfig", {**small, "embedding_size": 8}, word),
        ("DebertaV2Model", "DebertaV2Config", {**small, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}, word),
        ("DebertaModel", "DebertaConfig", {**small, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, word),
        ("EsmModel", "EsmConfig", {**small, "pad_token_id": 1, "position_embedding_type": "rotary"}, word),
        ("ModernBertModel", "ModernBertConfig", {**small, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}, "embeddings.tok_embeddings"),
        ("MPNetModel", "MPNetConfig", small, word),
        ("FNetModel", "FNetConfig", small, word),
        ("FunnelModel", "FunnelConfig", {"vocab_size": 60, "block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}, word),
        ("RoFormerModel", "RoFormerConfig", small, word),
        ("BigBirdModel", "BigBirdConfig", {**small, "attention_type": "original_full"}, word),
        ("LongformerModel", "LongformerConfig", {**small, "attention_window": [4, 4]}, word),
        ("T5EncoderModel", "T5Config", t5, "encoder.embed_tokens"),
        ("GPT2LMHeadModel", "GPT2Config", gpt, wte),
        ("GPTNeoForCausalLM", "GPTNeoConfig", {"vocab_size": 60, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}, wte),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", small, "gpt_neox.embed_in"),
        ("GPTJForCausalLM", "GPTJConfig", {**gpt, "rotary_dim": 4}, wte),
        ("OPTForCausalLM", "OPTConfig", {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": 16}, "model.decoder.embed_tokens"),
        ("BloomForCausalLM", "BloomConfig", {"vocab_size": 60, "hidden_size": 16, "n_layer": 2, "n_head": 2}, "transformer.word_embeddings"),
        ("LlamaForCausalLM", "LlamaConfig", few, embed),
        ("Qwen2ForCausalLM", "Qwen2Config", {**few, "num_key_value_heads": 1}, embed),
        ("Qwen3ForCausalLM", "Qwen3Config", few, embed),
        ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", experts, embed),
        ("MistralForCausalLM", "MistralConfig", {**few, "sliding_window": 4}, embed),
        ("MixtralForCausalLM", "MixtralConfig", moe, embed),
        ("GemmaForCausalLM", "GemmaConfig", few, embed),
        ("Gemma2ForCausalLM", "Gemma2Config", {**few, "sliding_window": 4}, embed),
        ("Gemma3ForCausalLM", "Gemma3TextConfig", {**few, "sliding_window": 4}, embed),
        ("PhiForCausalLM", "PhiConfig", small, embed),
        ("Phi3ForCausalLM", "Phi3Config", few, embed),
        ("FalconForCausalLM", "FalconConfig", {**small, "new_decoder_architecture": False}, "transformer.word_embeddings"),
        ("OlmoForCausalLM", "OlmoConfig", few, embed),
        ("StableLmForCausalLM", "StableLmConfig", few, embed),
        ("CohereForCausalLM", "CohereConfig", few, embed),
        ("GraniteForCausalLM", "GraniteConfig", few, embed),
        ("MambaForCausalLM", "MambaConfig", {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, "backbone.embeddings"),
        ("Mamba2ForCausalLM", "Mamba2Config", {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}, "backbone.embeddings"),
        ("RwkvForCausalLM", "RwkvConfig", {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "intermediate_size": 32}, "rwkv.embeddings"),
    ]  # fmt: skip
    for kind, config, options, source in texts:
        yield animal(kind, config, options, tokens, source=source)
    xlnet = {"vocab_size": 60, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}  # its embedding puts time first
    yield animal("XLNetModel", "XLNetConfig", xlnet, lambda: {"inputs_embeds": torch.randn(2, 7, 16)})
    both = lambda: {"input_ids": tokens(), "decoder_input_ids": tokens(5)}  # noqa: E731
    yield animal("T5ForConditionalGeneration", "T5Config", t5, both, source="encoder.embed_tokens")
    yield animal("BartForConditionalGeneration", "BartConfig", bart, both, source="model.encoder.layernorm_embedding")
    yield animal("MBartModel", "MBartConfig", bart, both, source="encoder.layernorm_embedding")
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    padded = lambda: {"input_ids": tokens(), "attention_mask": mask}  # noqa: E731
    for kind, config, options, source in (texts[0], texts[24], texts[18]):
        yield Animal(
            f"{kind} with a padding mask", functools.partial(made, kind, config, options), padded, source, None, _first
        )  # fmt: skip
    for kind, config, options, size in (
        ("ViTModel", "ViTConfig", image, 32),
        ("DeiTModel", "DeiTConfig", image, 32),
        ("BeitModel", "BeitConfig", {**image, "use_relative_position_bias": True}, 32),
        ("Dinov2Model", "Dinov2Config", image, 32),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", image, 32),
        ("DINOv3ViTModel", "DINOv3ViTConfig", image, 32),
        ("ViTMSNModel", "ViTMSNConfig", image, 32),
        ("CLIPVisionModel", "CLIPVisionConfig", image, 32),
        ("SiglipVisionModel", "SiglipVisionConfig", image, 32),
        ("YolosModel", "YolosConfig", {**image, "image_size": [32, 32], "num_detection_tokens": 3}, 32),
        ("SwinModel", "SwinConfig", {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}, 32),
        ("Swinv2Model", "Swinv2Config", {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}, 32),
        ("ConvNextModel", "ConvNextConfig", stages, 64),
        ("ConvNextV2Model", "ConvNextV2Config", stages, 64),
        ("ResNetModel", "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, 32),
        ("SegformerModel", "SegformerConfig", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]}, 64),
        ("PvtV2Model", "PvtV2Config", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]}, 64),
        ("MobileViTModel", "MobileViTConfig", {"image_size": 64, "initializer_range": 0.2, "hidden_sizes": [16, 20, 24], "neck_hidden_sizes": [8, 8, 12, 16, 16, 20, 24], "num_attention_heads": 2}, 64),
        ("MobileViTV2Model", "MobileViTV2Config", {"image_size": 64, "initializer_range": 0.2, "width_multiplier": 0.25}, 64),
        ("LevitModel", "LevitConfig", {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}, 64),
        ("PoolFormerModel", "PoolFormerConfig", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}, 64),
        ("RegNetModel", "RegNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}, 32),
    ):  # fmt: skip
        yield animal(kind, config, options, _image(size))
    for kind in ("Wav2Vec2", "Hubert", "WavLM"):
        yield animal(f"{kind}Model", f"{kind}Config", speech, lambda: torch.randn(2, 240))
    yield animal("ASTModel", "ASTConfig", {**{k: v for k, v in image.items() if "size" not in k or k == "intermediate_size"}, "hidden_size": 16, "max_length": 32, "num_mel_bins": 16, "patch_size": 8}, lambda: torch.randn(2, 32, 16))  # fmt: skip
    whisper = {**{k: v for k, v in bart.items() if k != "max_position_embeddings"}, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12}  # fmt: skip
    yield animal("WhisperForConditionalGeneration", "WhisperConfig", whisper, lambda: {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": tokens(5)})  # fmt: skip
    text = {k: v for k, v in small.items() if k != "pad_token_id"} | {"max_position_embeddings": 12}
    pair = lambda: {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 32, 32)}  # noqa: E731
    for kind in ("CLIP", "Siglip"):
        both_configs = {"text_config": text | {"eos_token_id": 2}, "vision_config": image, "projection_dim": 16}
        yield Animal(
            f"{kind}Model",
            functools.partial(made, f"{kind}Model", f"{kind}Config", both_configs),
            pair,
            transform=lambda out: out.image_embeds,
        )
    yield animal("TimeSeriesTransformerModel", "TimeSeriesTransformerConfig", {"prediction_length": 3, "context_length": 6, "lags_sequence": [1, 2], "num_time_features": 1, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}, lambda: {"past_values": torch.rand(2, 8) + 1, "past_time_features": torch.randn(2, 8, 1), "past_observed_mask": torch.ones(2, 8), "future_values": torch.rand(2, 3) + 1, "future_time_features": torch.randn(2, 3, 1)}, wrt="past_values")  # fmt: skip
    yield animal("PatchTSTModel", "PatchTSTConfig", {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "d_model": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32}, lambda: torch.randn(2, 16, 2))  # fmt: skip


def monai() -> Iterator[Animal]:
    from monai.networks import nets

    unet = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    steps = {"channels": (8, 16, 32), "strides": (2, 2)}
    image = _image(32, 1)
    volume = lambda: torch.randn(2, 1, 32, 32, 32)  # noqa: E731
    for kind, options, x in (
        ("UNet", {**unet, **steps}, image),
        ("BasicUNet", {**unet, "features": (8, 8, 16, 16, 16, 8)}, image),
        ("BasicUNetPlusPlus", {**unet, "features": (8, 8, 16, 16, 16, 8)}, image),
        ("AttentionUnet", {**unet, **steps}, image),
        ("AutoEncoder", {**unet, "channels": (8, 16), "strides": (2, 2)}, image),
        ("VarAutoEncoder", {"spatial_dims": 2, "out_channels": 1, "channels": (8, 16), "strides": (2, 2), "in_shape": (1, 32, 32), "latent_size": 4}, image),
        ("DynUNet", {**unet, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]}, image),
        ("SegResNet", {**unet, "init_filters": 8}, image),
        ("SegResNetDS", {**unet, "init_filters": 8, "blocks_down": (1, 1)}, image),
        ("SwinUNETR", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "feature_size": 12}, _image(64, 1)),
        ("UNETR", {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "img_size": 32, "feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2}, volume),
        ("VNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}, image),
        ("HighResNet", {**unet}, image),
        ("DenseNet121", {**unet}, image),
        ("SEResNet50", {"spatial_dims": 2, "in_channels": 1, "num_classes": 3}, _image(64, 1)),
        ("EfficientNetBN", {"model_name": "efficientnet-b0", "spatial_dims": 2, "in_channels": 1, "pretrained": False}, image),
        ("ResNet", {"block": "basic", "layers": (1, 1, 1, 1), "block_inplanes": (8, 8, 16, 16), "spatial_dims": 2, "n_input_channels": 1}, image),
        ("ViT", {"in_channels": 1, "img_size": (32, 32), "patch_size": 8, "spatial_dims": 2, "hidden_size": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 2, "classification": True}, image),
        ("ViTAutoEnc", {"in_channels": 1, "img_size": (32, 32), "patch_size": 16, "spatial_dims": 2, "hidden_size": 24, "mlp_dim": 48, "num_layers": 2, "num_heads": 2}, image),
        ("MedNeXt", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "init_filters": 4, "encoder_expansion_ratio": 2, "decoder_expansion_ratio": 2, "bottleneck_expansion_ratio": 2, "blocks_down": (1, 1, 1, 1), "blocks_bottleneck": 1, "blocks_up": (1, 1, 1, 1)}, image),
        ("AutoencoderKL", {**unet, "out_channels": 1, "channels": (8, 8), "num_res_blocks": 1, "norm_num_groups": 4, "attention_levels": (False, True), "latent_channels": 2}, image),
        ("Regressor", {"in_shape": (1, 32, 32), "out_shape": (2,), "channels": (4, 8), "strides": (2, 2)}, image),
        ("FullyConnectedNet", {"in_channels": 6, "out_channels": 3, "hidden_channels": [8, 8]}, lambda: torch.randn(2, 6)),
        ("FlexibleUNet", {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0", "spatial_dims": 2}, _image(64)),
        ("SegResNetVAE", {"input_image_size": (32, 32), "spatial_dims": 2, "in_channels": 1, "out_channels": 2, "init_filters": 8}, image),
    ):  # fmt: skip
        yield Animal(kind, functools.partial(getattr(nets, kind), **options), x)
    yield Animal("DiffusionModelUNet", lambda: nets.DiffusionModelUNet(2, 1, 1, channels=(8, 16), attention_levels=(False, True), num_res_blocks=1, norm_num_groups=4, num_head_channels=8), lambda: (torch.randn(2, 1, 16, 16), torch.tensor([3, 7])))  # fmt: skip


def segmentation_models_pytorch() -> Iterator[Animal]:
    import segmentation_models_pytorch as library

    for kind in ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus",
                 "UPerNet", "Segformer"):  # fmt: skip
        made = functools.partial(getattr(library, kind), "resnet18", encoder_weights=None)
        yield Animal(kind, made, _image(128 if kind == "PAN" else 64))
    for encoder in (
        "mobilenet_v2",
        "efficientnet-b0",
        "mit_b0",
        "timm-regnetx_002",
        "densenet121",
        "vgg11_bn",
        "se_resnet50",
    ):
        yield Animal(f"Unet {encoder}", functools.partial(library.Unet, encoder, encoder_weights=None), _image(64))


def diffusers() -> Iterator[Animal]:
    import diffusers as library

    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    cross_down, cross_up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    timed = lambda: (torch.randn(2, 3, 16, 16), torch.tensor([3, 70]))  # noqa: E731
    one = lambda: (torch.randn(2, 3, 16, 16), 10)  # noqa: E731

    def conditioned() -> dict[str, Any]:
        return {
            "sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([3, 70]),
            "encoder_hidden_states": torch.randn(2, 5, 8),
        }  # fmt: skip

    def latent(size: int, channels: int = 3) -> Callable[[], Any]:
        return lambda: torch.randn(2, channels, size, size)

    attention = {"attention_head_dim": 4}
    dit = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    for kind, options, x, more in (
        ("UNet2DModel", {"sample_size": 16, "down_block_types": down, "up_block_types": up, **blocks, **attention}, timed, {}),
        ("UNet2DModel, one timestep", {"sample_size": 16, "down_block_types": down, "up_block_types": up, **blocks, **attention}, one, {}),
        ("UNet2DConditionModel", {"sample_size": 16, "in_channels": 3, "out_channels": 3, "down_block_types": cross_down, "up_block_types": cross_up, "cross_attention_dim": 8, **blocks, **attention}, conditioned, {"wrt": "sample"}),
        ("UNet1DModel", {"block_out_channels": (32, 32), "in_channels": 2, "out_channels": 2, "extra_in_channels": 64, "layers_per_block": 1, "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"), "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip")}, lambda: (torch.randn(2, 2, 16), torch.tensor([3, 7])), {}),
        ("AutoencoderKL", {**ends, **blocks, "latent_channels": 4}, latent(16), {}),
        ("AutoencoderTiny", {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}, latent(16), {}),
        ("VQModel", {**ends, **blocks, "num_vq_embeddings": 16}, latent(16), {}),
        ("AsymmetricAutoencoderKL", {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",), "down_block_out_channels": (8,), "up_block_out_channels": (8,), "norm_num_groups": 4}, latent(16), {}),
        ("AutoencoderDC", {"attention_head_dim": 4, "latent_channels": 4, "encoder_block_types": ("ResBlock", "EfficientViTBlock"), "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,))}, latent(16), {}),
        ("DiTTransformer2DModel", {**dit, "in_channels": 4}, lambda: {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}, {}),
        ("SD3Transformer2DModel", {**dit, "in_channels": 4, "joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8, "out_channels": 4}, lambda: {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 8), "pooled_projections": torch.randn(2, 8), "timestep": torch.tensor([3, 7])}, {"wrt": "hidden_states"}),
        ("PixArtTransformer2DModel", {**dit, "in_channels": 4, "cross_attention_dim": 16, "caption_channels": 8, "use_additional_conditions": False}, lambda: {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 8), "timestep": torch.tensor([3, 7])}, {"wrt": "hidden_states"}),
        ("FluxTransformer2DModel", {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8)}, lambda: {"hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 5, 8), "pooled_projections": torch.randn(2, 8), "timestep": torch.tensor([3, 7]), "img_ids": torch.randint(9, (16, 3)), "txt_ids": torch.randint(9, (5, 3))}, {"wrt": "hidden_states"}),
        ("SanaTransformer2DModel", {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 8, "sample_size": 8}, lambda: {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 8), "timestep": torch.tensor([3, 7])}, {"wrt": "hidden_states"}),
    ):  # fmt: skip
        model = getattr(library, kind.partition(",")[0])
        yield Animal(kind, functools.partial(model, **options), x, transform=_first, **more)


class Nodes(nn.Module):
    """The nodes of a graph as one sample: x[None]; two such samples do not see each other."""

    def __init__(self, layer: nn.Module, *graph: Any) -> None:
        super().__init__()
        self.layer, self.graph = layer, graph

    def forward(self, x: Tensor) -> Tensor:
        graph = [g.to(x.dtype) if g.is_floating_point() else g for g in self.graph]
        return torch.stack([self.layer(sample, *graph) for sample in x])


def torch_geometric() -> Iterator[Animal]:
    from torch_geometric import nn as library

    edges = torch.tensor([[0, 1, 1, 2, 3, 4, 0, 5, 2], [1, 0, 2, 1, 4, 3, 5, 0, 5]])
    weights, kinds = torch.linspace(0.5, 1.5, 9)[:, None].expand(9, 3).contiguous(), torch.arange(9) % 3
    mlp = functools.partial(nn.Sequential, nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
    pairs = functools.partial(nn.Sequential, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    x = lambda: torch.randn(2, 6, 4)  # noqa: E731
    layers: list[tuple[str, Callable[[], nn.Module], tuple[Any, ...]]] = [
        *((k, functools.partial(getattr(library, k), 4, 5), (edges,)) for k in (
            "GCNConv", "SAGEConv", "GATConv", "GATv2Conv", "GraphConv", "TransformerConv", "TAGConv", "SGConv",
            "ARMAConv", "LEConv", "MFConv", "FeaStConv", "SuperGATConv", "FiLMConv", "GeneralConv", "ClusterGCNConv",
            "ResGatedGraphConv", "MixHopConv")),
        ("SSGConv", lambda: library.SSGConv(4, 5, 0.1), (edges,)),
        ("EGConv", lambda: library.EGConv(4, 6, num_heads=2), (edges,)),
        ("ChebConv", lambda: library.ChebConv(4, 5, K=3), (edges,)),
        ("GINConv", lambda: library.GINConv(mlp()), (edges,)),
        ("GINEConv", lambda: library.GINEConv(mlp(), edge_dim=3), (edges, weights)),
        ("NNConv", lambda: library.NNConv(4, 5, nn.Linear(3, 20)), (edges, weights)),
        ("EdgeConv", lambda: library.EdgeConv(pairs()), (edges,)),
        ("RGCNConv", lambda: library.RGCNConv(4, 5, 3), (edges, kinds)),
        ("GMMConv", lambda: library.GMMConv(4, 5, dim=3, kernel_size=2), (edges, weights)),
        ("PNAConv", lambda: library.PNAConv(4, 5, ["mean", "max", "std"], ["identity", "attenuation"], torch.tensor([0, 3, 3])), (edges,)),
        ("GatedGraphConv", lambda: library.GatedGraphConv(6, 2), (edges,)),
        ("APPNP", lambda: library.APPNP(K=3, alpha=0.1), (edges,)),
        ("GENConv", lambda: library.GENConv(4, 5), (edges,)),
        ("AGNNConv", lambda: library.AGNNConv(), (edges,)),
        ("GCN", lambda: library.GCN(4, 8, 2, 3), (edges,)),
        ("GAT", lambda: library.GAT(4, 8, 2, 3), (edges,)),
        ("GraphNorm", lambda: library.GraphNorm(4), ()),
        ("PairNorm", lambda: library.PairNorm(), ()),
    ]  # fmt: skip
    for name, make, graph in layers:
        yield Animal(name, lambda make=make, graph=graph: Nodes(make(), *graph), x)  # type: ignore[misc]


def vit_pytorch() -> Iterator[Animal]:
    import importlib

    vit = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
    for file, kind, options in (
        ("vit", "ViT", vit),
        ("simple_vit", "SimpleViT", vit),
        ("deepvit", "DeepViT", vit),
        ("cait", "CaiT", {**vit, "cls_depth": 1}),
        ("parallel_vit", "ViT", vit),
        ("rvt", "RvT", vit),
        ("vit_for_small_dataset", "ViT", vit),
        ("vit_with_patch_merger", "ViT", {**vit, "patch_merge_num_tokens": 4}),
        ("simple_vit_with_register_tokens", "SimpleViT", vit),
        ("simple_vit_with_qk_norm", "SimpleViT", vit),
        ("simple_vit_with_fft", "SimpleViT", {**vit, "freq_patch_size": 8}),
        ("normalized_vit", "nViT", vit),
        ("vit_nd", "ViTND", {"ndim": 2, "input_shape": 32, **{k: v for k, v in vit.items() if k != "image_size"}}),
        ("cct", "CCT", {"img_size": 32, "embedding_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}),
        ("levit", "LeViT", {"image_size": 64, "num_classes": 5, "dim": (16, 24), "heads": (2, 2), "stages": 2, "mlp_mult": 2, "depth": 1}),
        ("pit", "PiT", {**vit, "depth": (1, 1)}),
        ("xcit", "XCiT", {**vit, "cls_depth": 1}),
        ("max_vit", "MaxViT", {"num_classes": 5, "dim": 16, "depth": (1, 1), "dim_head": 8, "window_size": 4}),
        ("cvt", "CvT", {"num_classes": 5, "s1_emb_dim": 8, "s2_emb_dim": 8, "s3_emb_dim": 8, "s3_depth": 1}),
        ("twins_svt", "TwinsSVT", {"num_classes": 5, "s1_emb_dim": 8, "s2_emb_dim": 8, "s3_emb_dim": 8, "s4_emb_dim": 8, "s3_depth": 1, "s4_depth": 1, "s1_local_patch_size": 2, "s2_local_patch_size": 2, "s3_local_patch_size": 2, "s4_local_patch_size": 2, "s1_global_k": 2, "s2_global_k": 2, "s3_global_k": 2, "s4_global_k": 2}),
        ("mobile_vit", "MobileViT", {"image_size": (64, 64), "dims": [16, 20, 24], "channels": [8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 32], "num_classes": 5}),
        ("nest", "NesT", {"image_size": 32, "patch_size": 4, "dim": 8, "heads": 2, "num_hierarchies": 2, "block_repeats": (1, 1), "num_classes": 5}),
    ):  # fmt: skip
        size = {"levit": 64, "mobile_vit": 64, "twins_svt": 64}.get(file, 32)

        def make(file: str = file, kind: str = kind, options: dict[str, Any] = options) -> nn.Module:
            return getattr(importlib.import_module(f"vit_pytorch.{file}"), kind)(**options)

        yield Animal(f"{file}: {kind}", make, _image(size))


def torchdiffeq() -> Iterator[Animal]:
    from torchdiffeq import odeint, odeint_adjoint

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return self.net(z)

    class Flow(nn.Module):
        def __init__(self, solve: Any, options: dict[str, Any]) -> None:
            super().__init__()
            self.field, self.solve, self.options = Field(), solve, options

        def forward(self, z: Tensor) -> Tensor:
            return self.solve(self.field, z, torch.tensor([0.0, 1.0], dtype=z.dtype), **self.options)[-1]

    for method, options in (
        ("euler", {"options": {"step_size": 0.25}}), ("rk4", {"options": {"step_size": 0.25}}), ("midpoint", {}),
        ("dopri5", {}), ("implicit_adams", {"options": {"step_size": 0.25}}),
    ):  # fmt: skip
        made = functools.partial(Flow, odeint, {"method": method, **options})
        yield Animal(method, made, lambda: torch.randn(2, 3))
    adjoint = functools.partial(Flow, odeint_adjoint, {"method": "rk4", "options": {"step_size": 0.25}})
    yield Animal("rk4, adjoint", adjoint, lambda: torch.randn(2, 3))


def normflows() -> Iterator[Animal]:
    import normflows as library

    flows = library.flows

    class Forward(nn.Module):
        """The map alone, without the log-determinant that flows give beside it."""

        def __init__(self, flow: nn.Module) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, z: Tensor) -> Tensor:
            return self.flow(z)[0]

    net = functools.partial(library.nets.MLP, [2, 8, 4], init_zeros=False)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0])
    for name, make in (
        ("Planar", lambda: flows.Planar((4,))),
        ("Radial", lambda: flows.Radial((4,))),
        ("AffineCouplingBlock", lambda: flows.AffineCouplingBlock(net())),
        ("MaskedAffineFlow", lambda: flows.MaskedAffineFlow(mask, library.nets.MLP([4, 8, 4]), library.nets.MLP([4, 8, 4]))),
        ("LULinearPermute", lambda: flows.LULinearPermute(4)),
        ("AutoregressiveRationalQuadraticSpline", lambda: flows.AutoregressiveRationalQuadraticSpline(4, 1, 8)),
        ("CoupledRationalQuadraticSpline", lambda: flows.CoupledRationalQuadraticSpline(4, 1, 8)),
        ("CircularCoupledRationalQuadraticSpline", lambda: flows.CircularCoupledRationalQuadraticSpline(4, 1, 8, ind_circ=[0])),
        ("MaskedAffineAutoregressive", lambda: flows.MaskedAffineAutoregressive(4, 8)),
        ("ActNorm", lambda: flows.ActNorm((4,))),
        ("Residual", lambda: flows.Residual(library.nets.LipschitzMLP([4, 8, 4], init_zeros=False), reduce_memory=False)),
    ):  # fmt: skip
        yield Animal(name, lambda make=make: Forward(make()), lambda: torch.randn(2, 4))  # type: ignore[misc]
    glow = lambda: Forward(flows.GlowBlock(4, 8))  # noqa: E731
    yield Animal("GlowBlock", glow, lambda: torch.randn(2, 4, 6, 6))


def kan() -> Iterator[Animal]:
    import tempfile

    import kan as library

    def made(**options: Any) -> nn.Module:
        return library.KAN(ckpt_path=tempfile.mkdtemp(), auto_save=False, device="cpu", **options)

    yield Animal("KAN", functools.partial(made, width=[3, 4, 2], grid=3, k=3), lambda: torch.rand(2, 3))
    yield Animal(
        "KAN without symbols", functools.partial(made, width=[3, 2], symbolic_enabled=False), lambda: torch.rand(2, 3)
    )
    yield Animal(
        "MultKAN",
        lambda: library.MultKAN(width=[3, [2, 1], 1], ckpt_path=tempfile.mkdtemp(), auto_save=False),
        lambda: torch.rand(2, 3),
    )


#: By the name of the package.
LIBRARIES: dict[str, Callable[[], Iterator[Animal]]] = {
    f.__name__: f
    for f in (
        timm, torchvision, transformers, monai, segmentation_models_pytorch, diffusers, torch_geometric, vit_pytorch,
        torchdiffeq, normflows, kan,
    )
}  # fmt: skip
