"""Push a finished round's folder to the Hub, now or again where an earlier push has failed.

Launch:  accelerate launch recipes/publish.py --model_dir runs/continual_rounds/model \
             --hub_model_id user/name
         accelerate launch recipes/publish.py --model_dir runs/next_round \
             --hub_model_id user/name --hub_revision challenger

One commit and the tag of the round, such as round-003, on main; a challenger goes to a branch, or
by --create_pr into a pull request, and is tagged by recipes/promote.py. What is on the Hub already
is not sent again. The token is that of `hf auth login` or HF_TOKEN. Ends with status 1 where the
push fails.
"""

import sys
from dataclasses import dataclass, field, replace

from accelerate import Accelerator
from transformers import HfArgumentParser

import hf_dash


@dataclass
class PublishArguments:
    model_dir: str = field(metadata={"help": "Folder with model, card and history.json."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request."})


def main() -> None:
    args, hub = HfArgumentParser(
        (PublishArguments, hf_dash.hub.HubArguments)
    ).parse_args_into_dataclasses()
    if hub.hub_model_id is None:
        raise ValueError("hub_model_id must be given: user/name of the repository")
    if not Accelerator().is_main_process:
        return
    hub = replace(hub, push_to_hub=True)
    pushed = hf_dash.hub.push_folder(hub, args.model_dir, create_pr=args.create_pr)
    sys.exit(0 if pushed else 1)


if __name__ == "__main__":
    main()
