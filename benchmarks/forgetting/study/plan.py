"""The plan in numbers, as PLAN.md says it in words."""

from dataclasses import dataclass


# Shifts, in the order in which they are taken when the gate keeps more than are needed: two, and an untouched third.
SHIFTS = ("routing", "german", "characters", "numbers")
# The same with all linear layers of the model in training, proposed in this order while fewer than three are kept.
EVERYWHERE = ", all linear layers"
HARDER = tuple(f"{name}{EVERYWHERE}" for name in SHIFTS)
WANTED_SHIFTS = 3
TRAIN_ROWS, TEST_ROWS = 240, 64
STEPS, BATCH, WARMUP = 90, 8, 5
SCORED_STEPS = (22, 45, 90)  # a quarter, half and all of the run
BY_STEPS, BY_SCALES = "steps", "scales"  # paths from base to trained
SCALES = (0.5, 0.7)  # interpolations between base and trained
DEMONSTRATIONS = 5

TUNING_SEED = 0
SEEDS = (1, 2, 3, 4, 5)  # of the confirmation

SHARES = (0.5, 0.9)  # q of the targets
SHARE = 0.9  # that of all decisions
LEAST_FORGETTING = 0.05  # nats that both unprotected ways must forget at the target for a shift to be kept

KEPT_TOKENS = 8000  # general text that protection, replay and KL read: half Wikipedia, half docs
REPLAYED, PIECE = 0.25, 64  # share of a batch, and tokens of a row that is replayed
DIRECTIONS = 200  # leading ones that are protected, beside position 0 and the mean
COMPONENTS = 128  # of the decomposition of both domains
SCREENED_NETWORKS = (32, 64, 128)  # directions of networks that the screen tries
SCREENED = (8, 16, 32, 64)  # of a domain

LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
GATE = {"full": (3e-5,), "lora": (1e-4, 3e-4)}
TUNING = {
    "full": (3e-5, 1e-4, 3e-4),
    "lora": (1e-4, 3e-4, 1e-3),
    "subspace": (1e-4, 3e-4, 1e-3),
    "random": (3e-5, 1e-4, 3e-4),
    "replay": (3e-5, 1e-4, 3e-4),
}
NETWORK_RATES = (1e-4, 3e-4, 1e-3)
UNPROTECTED = ("full", "lora", "replay")  # whose best is what Q1 compares with
# Of the confirmation; the best unprotected of the tuning takes the place of `unprotected`.
THIRD = ("subspace", "random", "unprotected")

# Bases of Q2, and the two domains.
BASES = ("networks", "pca", "ceiling")
DOMAINS = ("wikipedia", "docs")

GOOD, GOAL = 0.5, 0.1  # ratios of KL for a yes to Q1, and what is hoped for
NO_DIFFERENCE = 0.22  # of logarithms, for a no to Q2


@dataclass(frozen=True)
class Texts:
    """
    How many tokens of each text are scored.

    Attributes:
        tokens (`dict[str, int]`): name of a text -> tokens.
        part (`str`): `choose`, on which rates are chosen, or `confirm`.
    """

    tokens: dict[str, int]
    part: str


CHOOSING = Texts({"wikipedia": 1500, "questions": 1000}, "choose")
CONFIRMING = Texts({"wikipedia": 6000, "questions": 4000, "chat": 1500}, "confirm")
SCREENING = Texts({"wikipedia": 1500, "questions": 1000, "docs": 1500}, "choose")
DISSOCIATION = Texts({"wikipedia": 3000, "docs": 3000}, "confirm")
PRIMARY = ("wikipedia", "questions")  # texts of Q1; of others it is only reported

STAGES = ("gate", "tuning", "screen", "networks", "confirmation", "third", "dissociation", "afterwards")
