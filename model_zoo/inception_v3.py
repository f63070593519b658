"""InceptionV3: as paper 001 trained it, and as paper 003 compared ALLNet with it."""

from functools import partial

from model_zoo._architecture import Architecture, one_logit, two_way
from model_zoo._backbones import INCEPTION_V3

ARCHITECTURE = Architecture(
    name="inception_v3",
    title="InceptionV3",
    build=partial(INCEPTION_V3.averaged, two_way, name="inception_v3"),
    input_size=299,
    cam_layers=("mixed10",),
    source="Paper 001 with a two-way softmax on average-pooled features: Szegedy et al. 2016, arXiv:1512.00567, "
    "without the auxiliary classifier. Input size ours.",
)
VARIANTS = {
    "allnet_baseline": Architecture(
        name="inception_v3.allnet_baseline",
        title="InceptionV3, ALLNet's baseline",
        build=partial(INCEPTION_V3.averaged, one_logit, name="inception_v3.allnet_baseline", standardised=True),
        input_size=250,
        cam_layers=("mixed10",),
        source="Paper 003, a baseline of ALLNet, with in-graph standardisation. The paper does not describe its head; "
        "one sigmoid unit on average-pooled features is ours.",
    )
}
