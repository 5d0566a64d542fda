"""The claims, what each is judged by, and its figure."""

from arms import BY_LENGTH, LONG_LABELS
from evidence import EXPERTS, Check, Claim, accuracy, fused, of_groups, rank, reach, reach_of_uniform, sharpness, taught
from figures import draw_bars, draw_distances, draw_lengths, draw_teachers

EPOCHS = max(BY_LENGTH)
LONGEST = BY_LENGTH[EPOCHS]


def beside_sgd(teacher: str, arm: str) -> list[Check]:
    """Rows, which judge nothing, of a student of another teacher beside that of the plain one."""
    return [
        *of_groups(f"{teacher} teacher less CE-SGD", arm, "deit-lt-sgd", ["tail"], ("mean", "distillation"), False),
        Check(
            f"effective rank of DIST features, CE-SGD teacher less {teacher}",
            rank("deit-lt-sgd", "overall"),
            rank(arm, "overall"),
            unit="",
            is_claimed=False,
        ),
    ]


CLAIMS = [
    Claim(
        "The experts part: DIST is ahead on the tail, CLS on the head",
        [
            Check(
                "DIST less CLS, tail",
                accuracy("deit-lt", "distillation", "tail"),
                accuracy("deit-lt", "cls", "tail"),
            ),
            Check(
                "CLS less DIST, head",
                accuracy("deit-lt", "cls", "head"),
                accuracy("deit-lt", "distillation", "head"),
            ),
            Check(
                "without a teacher, labels with DRW: DIST less CLS, tail",
                accuracy("labels-drw", "distillation", "tail"),
                accuracy("labels-drw", "cls", "tail"),
                is_claimed=False,
            ),
            Check(
                "without a teacher, labels with DRW: CLS less DIST, head",
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
            *of_groups("distilled, with less without", "deit-lt", "ood", ["tail"], ("mean", "distillation")),
            *of_groups(
                "distilled, with less without", "deit-lt", "ood", ["head", "overall"], ("mean", "distillation"), False
            ),
            *of_groups(
                "labels only, with less without",
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
            *of_groups("not mixed less mixed", "ood-unmixed", "deit-lt", ["overall", "tail"], is_claimed=False),
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
                "largest eigenvalue of the Hessian, SGD less SAM",
                sharpness("ce-sgd", "eigenvalue"),
                sharpness("ce-sam", "eigenvalue"),
                unit="",
            ),
            Check(
                "rise of the loss within 0.05, SGD less SAM",
                sharpness("ce-sgd", "loss_rise"),
                sharpness("ce-sam", "loss_rise"),
                unit="",
                decimals=2,
            ),
            Check(
                "effective rank of DIST features, SGD teacher less SAM",
                rank("deit-lt-sgd", "overall"),
                rank("deit-lt", "overall"),
                unit="",
            ),
            *of_groups("SAM teacher less SGD", "deit-lt", "deit-lt-sgd", ["tail"]),
            *of_groups("SAM teacher less SGD", "deit-lt", "deit-lt-sgd", ["tail"], ("distillation",), False),
            *beside_sgd("LDAM-SAM", "deit-lt-ldam"),
            *beside_sgd("PaCo-SAM", "deit-lt-paco"),
        ],
        draw_teachers,
    ),
    Claim(
        "Early blocks of DeiT-LT attend more locally than those of training on labels",
        [
            Check(
                "mean attention distance in the first half of the blocks, labels only less DeiT-LT",
                reach("labels"),
                reach("deit-lt"),
                unit="pixels",
                decimals=2,
            ),
            *(
                Check(
                    f"attention to all patches alike less {title}",
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
                f"labels only less DeiT-LT, both after {EPOCHS} epochs",
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
            *of_groups("less labels only", "deit-lt", "labels", ["overall", "tail"]),
            *of_groups("less plain DeiT distillation", "deit-lt", "deit", ["overall", "tail"]),
            *of_groups("less timm's token distillation", "deit-lt", "timm", ["overall", "tail"]),
            *of_groups(
                f"less labels only, both after {EPOCHS} epochs",
                LONGEST,
                LONG_LABELS,
                ["overall", "tail"],
                is_claimed=False,
            ),
            *of_groups("less labels with DRW", "deit-lt", "labels-drw", ["overall", "tail"], is_claimed=False),
            *of_groups("less labels with DRW", "deit-lt", "labels-drw", ["overall", "tail"], ("distillation",), False),
            *of_groups("less timm's", "deit-lt", "timm", ["overall", "tail"], ("distillation",), False),
            *of_groups(
                "ours without DRW less timm's, the same method",
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
                f"prediction after {EPOCHS} epochs less teacher, overall",
                accuracy(LONGEST, "mean", "overall"),
                taught(LONGEST, "overall"),
            ),
            Check(
                f"DIST after {EPOCHS} epochs less teacher, tail",
                accuracy(LONGEST, "distillation", "tail"),
                taught(LONGEST, "tail"),
            ),
            Check(
                f"experts fused by logit adjustment after {EPOCHS} epochs less teacher, overall",
                fused(LONGEST, "logit_adjustment", "overall"),
                taught(LONGEST, "overall"),
                is_claimed=False,
            ),
            Check(
                "prediction after 60 epochs less teacher, overall",
                accuracy("deit-lt", "mean", "overall"),
                taught("deit-lt", "overall"),
                is_claimed=False,
            ),
            Check(
                "DIST after 60 epochs less teacher, tail",
                accuracy("deit-lt", "distillation", "tail"),
                taught("deit-lt", "tail"),
                is_claimed=False,
            ),
        ],
        draw_lengths,
    ),
]
