"""Names that a config may hold and other modules go by, each list once; those of data sets: `published.py`."""

RUNNERS = ("runner_cir", "runner_cir_iter")
TASKS = ("composed_image_retrieval",)
LR_SCHEDULERS = ("linear_warmup_cosine_lr", "linear_warmup_step_lr", "constant_lr")

METHODS = ("image_only", "text_only", "sum", "tirg", "artemis", "combiner", "cross_attention")  # of cir_baseline
WITH_DROPOUT = ("combiner", "cross_attention")  # of these
# Universal tags, as spaCy gives them, but for those that never hold a word: PUNCT, SYM, X, SPACE.
PARTS_OF_SPEECH = ("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "SCONJ")
PARTS_OF_SPEECH += ("VERB",)

FITS = ("pad", "crop", "stretch")
AUGMENTS = ("none", "crop_flip")
# Mean and deviation of an encoder's pixels, red, green, blue.
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
