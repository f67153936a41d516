"""python jobs/study.py labels [RECIPE] [key=value ...]
python jobs/study.py ablation [RECIPE] [key=value ...]
python jobs/study.py tasks [RECIPE] [key=value ...]
python jobs/study.py systems [RECIPE] [key=value ...]

labels    what pretraining is worth for 100, 200, 1,000 labels. For every seed: pretrains (masked,
          aligned, masked for longer), then R2 on held-out subjects of ridges, an untrained
          encoder, training from scratch, probes and fine-tuning, at every evaluate.accelerations;
          probes also with augmented copies of the labelled subjects, as training sees them
ablation  which choices of pretraining and alignment matter: pretrains the variants of
          kmtr/studies/variants.py for study.ablation_steps and scores each by the probe
tasks     phenotypes, diseases, segmentation and reconstruction in one model (or those of
          task.tasks), fine-tuned from the pretrained encoder and from scratch at each of
          study.task_labels; each task alone at study.single_labels; and floors that need no
          trained network. For every seed: pretrains, trains task.steps on labels, scores on
          held-out subjects at every evaluate.accelerations, and compares on the same subjects
systems   k-MTR beside its opponents (kmtr/studies/contenders.py): itself from scratch, also with
          the seconds of pretraining on top, the same transformer on zero-filled patches, U-Nets and
          ResNets on zero-filled, temporally shared and full images, LI-Net- and KMAE-style systems,
          the image encoder on full images, x-f U-Net and k-GIN for images, and reconstructions that
          are analysed by what was trained on full images; each trains as many seconds on all
          labels, those on full images until validation stops improving. U-Nets (x-f too) and
          ResNets need kmtr[baselines]. Its report shows masks, images and embeddings of the first
          seed as well

Recipe: tiny, unless given. Killed at any time, the same command goes on; what is done is never
done again. Tables, a figure and an HTML report lie in storage.root/study/, metrics in an MLflow
run whose children are the trainings. tasks and systems keep their finished rows in
study.rows=FOLDER, a few MB without names of subjects: with them they go on, or report, on
another machine; study.train=false reports the rows that are there. With train.workers=1 as
many of their rows are made side by side as the cluster has room for, in processes that live
as long as the study: on small machines with data.loader=threads, which needs no room of its own.

examples:
  python jobs/study.py labels tiny
  python jobs/study.py ablation study.seeds=0 study.concurrent=1
  python jobs/study.py tasks tiny study.rows=rows study.task_labels=50,200 study.single_labels=200
  python jobs/study.py systems tiny study.systems=pretrained,unet-shared,unet-full study.seeds=0
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jobs import main, recipe_config


def run(words: list[str]) -> dict[str, Any]:
    from kmtr.config.recipes import named
    from kmtr.studies import ablation, labels, systems, tasks
    from kmtr.types import InputError

    kinds = {
        "labels": labels.run,
        "ablation": ablation.run,
        "tasks": tasks.run,
        "systems": lambda config: tasks.run(config, systems.KIND),
    }
    what, *rest = words or [""]
    if what not in kinds:
        raise InputError(f"study: expected what to study, one of {', '.join(kinds)}, got {what!r}")
    if not rest or "=" in rest[0]:
        rest = [named("study", words), *rest]
    config = recipe_config(rest, __doc__ or "")
    if config.run.fresh:
        raise InputError("run.fresh: expected false, got true; another run.name starts a study anew")
    return kinds[what](config)


if __name__ == "__main__":
    main(__doc__ or "", run)
