"""ResNet50: as paper 001 trained it, and as paper 003 compared ALLNet with it."""

from functools import partial

from model_zoo._architecture import Architecture, one_logit, two_way
from model_zoo._backbones import RESNET50

ARCHITECTURE = Architecture(
    name="resnet50",
    title="ResNet50",
    build=partial(RESNET50.averaged, two_way, name="resnet50"),
    input_size=224,
    cam_layers=("conv5_block3_out",),
    source="Paper 001 with a two-way softmax on average-pooled features: He et al. 2016, arXiv:1512.03385. Input size ours.",
)
VARIANTS = {
    "allnet_baseline": Architecture(
        name="resnet50.allnet_baseline",
        title="ResNet50, ALLNet's baseline",
        build=partial(RESNET50.averaged, one_logit, name="resnet50.allnet_baseline", standardised=True),
        input_size=250,
        cam_layers=("conv5_block3_out",),
        source="Paper 003, a baseline of ALLNet, with in-graph standardisation. The paper does not describe its head; "
        "one sigmoid unit on average-pooled features is ours.",
    )
}
