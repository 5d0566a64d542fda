"""The claims, with the checks that judge each claim and its figure."""

from arms import BY_LENGTH, LONG_CNN, LONG_LABELS, SHORT_BY_LONG_CNN, TAUGHT_BY_LONG_CNN
from evidence import EXPERTS, Check, Claim, accuracy, fused, of_groups, rank, reach, reach_of_uniform, sharpness, taught
from figures import draw_bars, draw_beside_teacher, draw_distances, draw_lengths, draw_prices, draw_teachers

EPOCHS = max(BY_LENGTH)
LONGEST = BY_LENGTH[EPOCHS]


def beside_sgd(teacher: str, arm: str) -> list[Check]:
    """Rows without a verdict that compare a student of another teacher with that of the plain one."""
    return [
        *of_groups(f"{teacher} teacher minus CE-SGD", arm, "deit-lt-sgd", ["tail"], ("mean", "distillation"), False),
        Check(
            f"effective rank of DIST features, CE-SGD teacher minus {teacher}",
            rank("deit-lt-sgd", "overall"),
            rank(arm, "overall"),
            unit="",
            is_claimed=False,
        ),
    ]


CLAIMS = [
    Claim(
        "The experts specialise: DIST is ahead on the tail, CLS on the head",
        [
            Check(
                "DIST minus CLS, tail",
                accuracy("deit-lt", "distillation", "tail"),
                accuracy("deit-lt", "cls", "tail"),
            ),
            Check(
                "CLS minus DIST, head",
                accuracy("deit-lt", "cls", "head"),
                accuracy("deit-lt", "distillation", "head"),
            ),
            Check(
                "without a teacher, labels with DRW: DIST minus CLS, tail",
                accuracy("labels-drw", "distillation", "tail"),
                accuracy("labels-drw", "cls", "tail"),
                is_claimed=False,
            ),
            Check(
                "without a teacher, labels with DRW: CLS minus DIST, head",
                accuracy("labels-drw", "cls", "head"),
                accuracy("labels-drw", "distillation", "head"),
                is_claimed=False,
            ),
        ],
        draw_bars({"": [("deit-lt", expert, name) for expert, name in EXPERTS.items()]}),
    ),
    Claim(
        "Deferred re-weighting lifts the tail",
        [
            *of_groups("distilled, with minus without", "deit-lt", "ood", ["tail"], ("mean", "distillation")),
            *of_groups(
                "distilled, with minus without", "deit-lt", "ood", ["head", "overall"], ("mean", "distillation"), False
            ),
            *of_groups(
                "labels only, with minus without",
                "labels-drw",
                "labels",
                ["tail", "head", "overall"],
                ("mean", "distillation"),
                False,
            ),
        ],
        draw_bars(
            {
                "distilled, prediction": [
                    ("deit-lt", "mean", "with DRW"),
                    ("ood", "mean", "without"),
                ],
                "distilled, DIST": [
                    ("deit-lt", "distillation", "with DRW"),
                    ("ood", "distillation", "without"),
                ],
                "labels only, DIST": [
                    ("labels-drw", "distillation", "with DRW"),
                    ("labels", "distillation", "without"),
                ],
            }
        ),
    ),
    Claim(
        "Out-of-distribution distillation is ahead of in-distribution",
        [
            *of_groups("with DRW", "deit-lt", "id-drw", ["overall", "tail"]),
            *of_groups("with DRW", "deit-lt", "id-drw", ["overall", "tail"], ("distillation",), False),
            *of_groups("without DRW", "ood", "deit", ["overall", "tail"], ("mean", "distillation"), False),
            *of_groups("in distribution not mixed", "deit-lt", "id-unmixed", ["overall", "tail"], is_claimed=False),
            *of_groups("neither mixed", "ood-unmixed", "id-unmixed", ["overall", "tail"], is_claimed=False),
            *of_groups("not mixed minus mixed", "ood-unmixed", "deit-lt", ["overall", "tail"], is_claimed=False),
        ],
        draw_bars(
            {
                "with DRW, prediction": [
                    ("deit-lt", "mean", "out of distribution"),
                    ("id-drw", "mean", "in distribution"),
                ],
                "without DRW, prediction": [
                    ("ood", "mean", "out of distribution"),
                    ("deit", "mean", "in distribution"),
                ],
            }
        ),
    ),
    Claim(
        "SAM teachers are flatter, their students' DIST features of lower rank, and the students better on the tail",
        [
            Check(
                "largest eigenvalue of the Hessian, SGD minus SAM",
                sharpness("ce-sgd", "eigenvalue"),
                sharpness("ce-sam", "eigenvalue"),
                unit="",
            ),
            Check(
                "rise of the loss within 0.05, SGD minus SAM",
                sharpness("ce-sgd", "loss_rise"),
                sharpness("ce-sam", "loss_rise"),
                unit="",
                decimals=2,
            ),
            Check(
                "effective rank of DIST features, SGD teacher minus SAM",
                rank("deit-lt-sgd", "overall"),
                rank("deit-lt", "overall"),
                unit="",
            ),
            *of_groups("SAM teacher minus SGD", "deit-lt", "deit-lt-sgd", ["tail"]),
            *of_groups("SAM teacher minus SGD", "deit-lt", "deit-lt-sgd", ["tail"], ("distillation",), False),
            *beside_sgd("LDAM-SAM", "deit-lt-ldam"),
            *beside_sgd("PaCo-SAM", "deit-lt-paco"),
        ],
        draw_teachers,
    ),
    Claim(
        "Early blocks of DeiT-LT attend more locally than those of training on labels",
        [
            Check(
                "mean attention distance in the first half of the blocks, labels only minus DeiT-LT",
                reach("labels"),
                reach("deit-lt"),
                unit="pixels",
                decimals=2,
            ),
            *(
                Check(
                    f"attention to all patches alike minus {title}",
                    reach_of_uniform(arm),
                    reach(arm),
                    is_claimed=False,
                    unit="pixels",
                    decimals=2,
                )
                for arm, title in (
                    ("labels", "labels only"),
                    ("deit-lt", "DeiT-LT"),
                    (LONG_LABELS, f"labels only after {EPOCHS} epochs"),
                    (LONGEST, f"DeiT-LT after {EPOCHS} epochs"),
                )
            ),
            Check(
                f"labels only minus DeiT-LT, both after {EPOCHS} epochs",
                reach(LONG_LABELS),
                reach(LONGEST),
                is_claimed=False,
                unit="pixels",
                decimals=2,
            ),
        ],
        draw_distances,
    ),
    Claim(
        "DeiT-LT is ahead of training on labels, of plain DeiT distillation and of timm's token distillation",
        [
            *of_groups("minus labels only", "deit-lt", "labels", ["overall", "tail"]),
            *of_groups("minus plain DeiT distillation", "deit-lt", "deit", ["overall", "tail"]),
            *of_groups("minus timm's token distillation", "deit-lt", "timm", ["overall", "tail"]),
            *of_groups(
                f"minus labels only, both after {EPOCHS} epochs",
                LONGEST,
                LONG_LABELS,
                ["overall", "tail"],
                is_claimed=False,
            ),
            *of_groups("minus labels with DRW", "deit-lt", "labels-drw", ["overall", "tail"], is_claimed=False),
            *of_groups("minus labels with DRW", "deit-lt", "labels-drw", ["overall", "tail"], ("distillation",), False),
            *of_groups("minus timm's", "deit-lt", "timm", ["overall", "tail"], ("distillation",), False),
            *of_groups(
                "ours without DRW minus timm's, the same method",
                "ood",
                "timm",
                ["overall", "tail"],
                ("mean", "cls", "distillation"),
                False,
            ),
        ],
        draw_bars(
            {
                "prediction": [
                    ("deit-lt", "mean", "DeiT-LT"),
                    ("labels", "mean", "labels only"),
                    ("deit", "mean", "plain DeiT distillation"),
                    ("timm", "mean", "timm's token distillation"),
                ]
            }
        ),
    ),
    Claim(
        "DeiT-LT's student reaches its teacher",
        [
            Check(
                f"prediction after {EPOCHS} epochs minus teacher, overall",
                accuracy(LONGEST, "mean", "overall"),
                taught(LONGEST, "overall"),
            ),
            Check(
                f"DIST after {EPOCHS} epochs minus teacher, tail",
                accuracy(LONGEST, "distillation", "tail"),
                taught(LONGEST, "tail"),
            ),
            Check(
                f"experts fused by logit adjustment after {EPOCHS} epochs minus teacher, overall",
                fused(LONGEST, "logit_adjustment", "overall"),
                taught(LONGEST, "overall"),
                is_claimed=False,
            ),
            Check(
                "prediction after 60 epochs minus teacher, overall",
                accuracy("deit-lt", "mean", "overall"),
                taught("deit-lt", "overall"),
                is_claimed=False,
            ),
            Check(
                "DIST after 60 epochs minus teacher, tail",
                accuracy("deit-lt", "distillation", "tail"),
                taught("deit-lt", "tail"),
                is_claimed=False,
            ),
        ],
        draw_lengths,
    ),
    # Beyond the paper.
    Claim(
        "Ours is ahead of DeiT-LT at a lower price, and not behind on the head",
        [
            *of_groups("both after 60 epochs", "ours", "deit-lt", ["overall", "tail"]),
            *of_groups(f"ours after 60 epochs minus DeiT-LT after {EPOCHS}", "ours", LONGEST, ["overall", "tail"]),
            Check(
                "both after 60 epochs: prediction, head; behind by less than a point",
                accuracy("ours", "mean", "head"),
                accuracy("deit-lt", "mean", "head"),
                margin=1.0,
            ),
            *of_groups("both after 60 epochs", "ours", "deit-lt", ["overall", "tail"], ("cls", "distillation"), False),
        ],
        draw_prices,
    ),
    Claim(
        "Ours passes its teacher",
        [
            *(
                Check(
                    f"prediction minus teacher, {group}",
                    accuracy("ours", "mean", group),
                    taught("ours", group),
                    is_claimed=group in ("overall", "tail"),
                )
                for group in ("overall", "tail", "head", "mid")
            ),
            Check(
                "experts fused by logit adjustment minus teacher, overall",
                fused("ours", "logit_adjustment", "overall"),
                taught("ours", "overall"),
                is_claimed=False,
            ),
            Check(
                "DeiT-LT with Muon minus teacher, overall",
                accuracy("deit-lt-muon", "mean", "overall"),
                taught("deit-lt-muon", "overall"),
                is_claimed=False,
            ),
        ],
        draw_beside_teacher({"ours": "ours", "deit-lt-muon": "DeiT-LT, Muon", "deit-lt": "DeiT-LT"}),
    ),
    Claim(
        "Ours is ahead of labels only and of timm's token distillation with Muon, and of the CNN trained as long",
        [
            *of_groups("minus labels only, Muon", "ours", "labels-muon", ["overall", "tail"]),
            *of_groups("minus timm's, Muon", "ours", "timm-muon", ["overall", "tail"]),
            *(
                Check(
                    f"minus the CNN after 90 epochs: {group}",
                    accuracy("ours", "mean", group),
                    accuracy(LONG_CNN, "teacher", group),
                )
                for group in ("overall", "tail")
            ),
            *(
                check
                for arm, what in ((TAUGHT_BY_LONG_CNN, "taught by it"), (SHORT_BY_LONG_CNN, "30 epochs, taught by it"))
                for check in (
                    *of_groups(f"{what}, minus ours", arm, "ours", ["overall", "tail"], is_claimed=False),
                    *(
                        Check(
                            f"{what}, minus the CNN after 90 epochs: {group}",
                            accuracy(arm, "mean", group),
                            accuracy(LONG_CNN, "teacher", group),
                            is_claimed=False,
                        )
                        for group in ("overall", "tail")
                    ),
                )
            ),
        ],
        draw_bars(
            {
                "prediction": [
                    ("ours", "mean", "ours"),
                    ("labels-muon", "mean", "labels only"),
                    ("timm-muon", "mean", "timm's"),
                    (LONG_CNN, "teacher", "the CNN"),
                ]
            }
        ),
    ),
    Claim(
        "Muon adds to each way of training, at a lower price",
        [
            *of_groups("DeiT-LT, not mixed: Muon minus AdamW", "deit-lt-muon", "ood-unmixed", ["overall", "tail"]),
            *of_groups(
                f"DeiT-LT: Muon after 60 epochs minus AdamW after {EPOCHS}",
                "deit-lt-muon",
                LONGEST,
                ["overall", "tail"],
            ),
            *of_groups(
                f"labels only: Muon, balanced softmax after 60 epochs minus AdamW after {EPOCHS}",
                "labels-muon",
                LONG_LABELS,
                ["overall", "tail"],
            ),
            *of_groups("timm's: Muon, not mixed minus AdamW, mixed", "timm-muon", "timm", ["overall", "tail"]),
            *of_groups(
                "ours minus DeiT-LT, Muon", "ours", "deit-lt-muon", ["overall", "tail", "head"], is_claimed=False
            ),
        ],
        draw_bars(
            {
                title: [(muon, "mean", "Muon"), (adamw, "mean", "AdamW")]
                for title, muon, adamw in (
                    ("DeiT-LT, not mixed", "deit-lt-muon", "ood-unmixed"),
                    (f"labels only, 60 and {EPOCHS} epochs", "labels-muon", LONG_LABELS),
                    ("timm's token distillation", "timm-muon", "timm"),
                )
            }
        ),
    ),
    Claim(
        "With Muon, too, the experts specialise, and re-weighting and the out-of-distribution view help",
        [
            Check(
                "DIST minus CLS, tail",
                accuracy("deit-lt-muon", "distillation", "tail"),
                accuracy("deit-lt-muon", "cls", "tail"),
            ),
            Check(
                "CLS minus DIST, head",
                accuracy("deit-lt-muon", "cls", "head"),
                accuracy("deit-lt-muon", "distillation", "head"),
            ),
            *of_groups("with DRW minus without", "deit-lt-muon", "ood-muon", ["tail"]),
            *of_groups("with DRW minus without", "deit-lt-muon", "ood-muon", ["head", "overall"], is_claimed=False),
            *of_groups("out of distribution minus in distribution", "deit-lt-muon", "id-drw-muon", ["overall", "tail"]),
        ],
        draw_bars(
            {
                "experts of DeiT-LT, Muon": [("deit-lt-muon", expert, name) for expert, name in EXPERTS.items()],
                "prediction": [
                    ("deit-lt-muon", "mean", "DeiT-LT"),
                    ("ood-muon", "mean", "without DRW"),
                    ("id-drw-muon", "mean", "in distribution"),
                ],
            }
        ),
    ),
]
