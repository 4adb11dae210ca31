"""What an emoji shows, read from its code points, and the sentences that ask for a change.

A person or hand emoji is a tuple of attributes (Unicode TR51: a base, a skin tone, zero-width joiners, a gender sign,
a hair component, an object, a direction), so two emoji that differ in one attribute make a composed query without any
wording to be parsed. Objects and faces have no such tuple; pairs of names that differ in one word serve for them.
"""

from dataclasses import dataclass, replace

from neucore_plugin.datasets.sampling import choose

TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
ADULTS = {0x1F468: "man", 0x1F469: "woman", 0x1F9D1: ""}
GENDER_SIGNS = {0x2640: "woman", 0x2642: "man"}
HAIR = {0x1F9B0: "red", 0x1F9B1: "curly", 0x1F9B2: "bald", 0x1F9B3: "white"}
HAIR_BASES = {0x1F471: "blond", 0x1F9D4: "beard"}
JOINER, PRESENTATION, RIGHT = 0x200D, 0xFE0F, 0x27A1
ADULT, CHILD = "an ordinary adult", "a child"
# The two people of these emoji carry a tone each, or one for both: no single tuple describes them.
PAIRS = frozenset([0x1F46B, 0x1F46C, 0x1F46D, 0x1F46F, 0x1F48F, 0x1F491, 0x1F46A, 0x1F93C, 0x1FAC2])


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _table(text: str) -> dict[int, str]:
    entries = (entry.split(maxsplit=1) for line in text.splitlines() for entry in line.split(";") if entry.strip())
    return {int(code, 16): phrase.strip() for code, phrase in entries}


# Adult + joiner + object; the phrase both names the role and continues the sentence "now ...".
PROFESSIONS = _table("""
2695 a health worker; 2696 a judge; 2708 a pilot; 1F33E a farmer; 1F373 a cook; 1F37C feeding a baby
1F384 in a Santa outfit; 1F393 a student; 1F3A4 a singer; 1F3A8 an artist; 1F3EB a teacher; 1F3ED a factory worker
1F4BB a technologist; 1F4BC an office worker; 1F527 a mechanic; 1F52C a scientist; 1F680 an astronaut
1F692 a firefighter; 1F9AF walking with a white cane; 1F9BC in a motorized wheelchair; 1F9BD in a manual wheelchair
1FA70 a ballet dancer
""")

# Base of neutral gender; a joined gender sign makes it a man or a woman.
ROLES = _table("""
26F9 bouncing a ball; 1F3C2 snowboarding; 1F3C3 running; 1F3C4 surfing; 1F3C7 racing a horse; 1F3CA swimming
1F3CB lifting weights; 1F3CC golfing; 1F46E a police officer; 1F470 wearing a veil; 1F472 wearing a skullcap
1F473 wearing a turban; 1F476 a baby; 1F477 a construction worker; 1F47C a baby angel; 1F481 tipping a hand
1F482 a palace guard; 1F486 getting a face massage; 1F487 getting a haircut; 1F574 levitating in a suit
1F575 a detective; 1F645 gesturing no; 1F646 gesturing OK; 1F647 bowing down; 1F64B raising one hand; 1F64D frowning
1F64E pouting; 1F6A3 rowing a boat; 1F6B4 riding a bicycle; 1F6B5 riding a mountain bike; 1F6B6 walking
1F6C0 taking a bath; 1F6CC lying in bed; 1F926 facepalming; 1F935 in a tuxedo; 1F937 shrugging
1F938 doing a cartwheel; 1F939 juggling; 1F93A fencing; 1F93D playing water polo; 1F93E playing handball; 1F977 a ninja
1F9B8 a superhero; 1F9B9 a supervillain; 1F9CC a troll; 1F9CD standing; 1F9CE kneeling; 1F9CF pointing at the ear
1F9D6 in a steamy room; 1F9D7 climbing; 1F9D8 in lotus position; 1F9D9 a mage; 1F9DA a fairy; 1F9DB a vampire
1F9DC a merperson; 1F9DD an elf; 1F9DE a genie; 1F9DF a zombie; 26F7 skiing; 1FAC8 a hairy creature
""")

# Bases that fix the gender themselves: code -> (role, gender).
GENDERED = {
    0x1F9D2: (CHILD, ""),
    0x1F466: (CHILD, "man"),
    0x1F467: (CHILD, "woman"),
    0x1F9D3: ("an old person", ""),
    0x1F474: ("an old person", "man"),
    0x1F475: ("an old person", "woman"),
    0x1FAC5: ("wearing a crown", ""),
    0x1F934: ("wearing a crown", "man"),
    0x1F478: ("wearing a crown", "woman"),
    0x1FAC4: ("pregnant", ""),
    0x1FAC3: ("pregnant", "man"),
    0x1F930: ("pregnant", "woman"),
    0x1F385: ("in a Santa outfit", "man"),
    0x1F936: ("in a Santa outfit", "woman"),
    0x1F57A: ("dancing", "man"),
    0x1F483: ("dancing", "woman"),
    0x1F931: ("breastfeeding", "woman"),
    0x1F9D5: ("wearing a headscarf", "woman"),
}

GESTURES = _table("""
261D an index finger pointing up, seen from the front; 270A a raised fist; 270B a raised palm; 270C a victory sign
270D a writing hand; 1F442 an ear; 1F443 a nose; 1F446 a backhand pointing up; 1F447 a backhand pointing down
1F448 a backhand pointing left; 1F449 a backhand pointing right; 1F44A a fist coming at the viewer; 1F44B a waving hand
1F44C an OK sign; 1F44D a thumbs up; 1F44E a thumbs down; 1F44F clapping hands; 1F450 two open hands
1F485 painting nails; 1F4AA a flexed biceps; 1F590 a hand with fingers splayed; 1F595 a middle finger
1F596 a vulcan salute; 1F64C hands raised in celebration; 1F64F folded hands; 1F90C pinched fingers
1F90F a pinching hand; 1F918 the sign of the horns; 1F919 a call me gesture; 1F91A the back of a raised hand
1F91B a fist facing left; 1F91C a fist facing right; 1F91D a handshake; 1F91E crossed fingers
1F91F a love you gesture; 1F932 palms up together; 1F933 taking a selfie; 1F9B5 a leg; 1F9B6 a foot
1F9BB an ear with a hearing aid; 1FAF0 finger and thumb crossed; 1FAF1 a flat hand to the right
1FAF2 a flat hand to the left; 1FAF3 a palm facing down; 1FAF4 a palm facing up; 1FAF5 a finger pointing at the viewer
1FAF6 hands forming a heart; 1FAF7 a hand pushing left; 1FAF8 a hand pushing right
""")


@dataclass(frozen=True)
class Attributes:
    """One person or hand emoji. Empty string = the neutral value; `direction` "right" = turned to the right."""

    kind: str  # "person" | "hand"
    role: str  # what the person is or does, or the gesture, as a phrase
    gender: str = ""  # "" | "man" | "woman"
    tone: str = ""  # "" | light ... dark
    hair: str = ""  # "" | red | curly | bald | white | blond | beard; ordinary adults only
    direction: str = ""  # "" | "right"

    def without(self, *fields: str) -> "Attributes":
        """The tuple with the named fields blanked: emoji that agree on it differ in these fields alone."""
        return replace(self, **dict.fromkeys(fields, "*"))


def code_points(emoji_id: str) -> tuple[int, ...]:
    """Code points of a file name such as `1F468-1F3FB-200D-1F692`, variation selectors dropped (files drop some)."""
    return tuple(code for code in (int(part, 16) for part in emoji_id.split("-")) if code != PRESENTATION)


def parse(emoji_id: str) -> Attributes | None:
    """Attributes of a person or hand emoji; None for everything else, couples and families included."""
    parts: list[list[int]] = [[]]
    for code in code_points(emoji_id):
        if code == JOINER:
            parts.append([])
        else:
            parts[-1].append(code)
    (base, *modifiers), joined = (parts[0] or [0]), parts[1:]
    if any(len(part) != 1 for part in joined) or len(modifiers) > 1 or any(code not in TONES for code in modifiers):
        return None
    tone = TONES[modifiers[0]] if modifiers else ""
    rest = [part[0] for part in joined]
    if base in GESTURES:
        return None if rest else Attributes("hand", GESTURES[base], tone=tone)
    direction = ""
    if rest and rest[-1] == RIGHT:
        direction, rest = "right", rest[:-1]
    if base in ADULTS:
        return _adult(ADULTS[base], tone, direction, rest)
    if base in GENDERED:
        role, gender = GENDERED[base]
        return None if rest else Attributes("person", role, gender, tone, direction=direction)
    if base not in ROLES and base not in HAIR_BASES:
        return None
    if len(rest) > 1 or any(code not in GENDER_SIGNS for code in rest):
        return None
    gender = GENDER_SIGNS[rest[0]] if rest else ""
    role, hair = (ROLES[base], "") if base in ROLES else (ADULT, HAIR_BASES[base])
    return Attributes("person", role, gender, tone, hair, direction)


def _adult(gender: str, tone: str, direction: str, rest: list[int]) -> Attributes | None:
    if not rest:
        return Attributes("person", ADULT, gender, tone, direction=direction)
    if len(rest) > 1:
        return None
    if rest[0] in HAIR:
        return Attributes("person", ADULT, gender, tone, HAIR[rest[0]], direction)
    if rest[0] in PROFESSIONS:
        return Attributes("person", PROFESSIONS[rest[0]], gender, tone, direction=direction)
    return None


def is_people(emoji_id: str) -> bool:
    """True for whatever shows people or hands, couples and families included: no object query is made of these."""
    return any(
        code in ADULTS or code in GENDERED or code in ROLES or code in HAIR_BASES or code in GESTURES or code in PAIRS
        for code in code_points(emoji_id)[:1]
    )


_HAIR_TEXT = {
    "": ["with ordinary hair", "give them ordinary hair", "now with ordinary hair"],
    "bald": ["now bald", "make them bald", "without any hair"],
    "beard": ["with a beard", "give them a beard", "now wearing a beard"],
}
_GENDER_TEXT = {
    "": ["the same but gender-neutral", "now of no particular gender", "make them gender-neutral"],
    "man": ["the same but a man", "now a man", "make it a man"],
    "woman": ["the same but a woman", "now a woman", "make it a woman"],
}
_CHILD_GENDER_TEXT = {  # "a man" would be wrong, "a boy" would name what stays
    "man": ["the same but male", "now male", "make them male"],
    "woman": ["the same but female", "now female", "make them female"],
}


def change_text(change: str, target: Attributes, key: str) -> str:
    """The relative caption that turns a reference into `target`: it names what changes, never what stays.

    `change` is one of tone, gender, hair, role, direction, gender+tone; `key` picks one of the phrasings.
    """
    tone = target.tone or "yellow"
    if change == "tone":
        options = [f"with {tone} skin", f"make the skin {tone}", f"change the skin tone to {tone}"]
    elif change == "gender":
        table = _CHILD_GENDER_TEXT if target.role == CHILD and target.gender else _GENDER_TEXT
        options = table[target.gender]
    elif change == "hair":
        hair = f"{target.hair} hair"
        options = _HAIR_TEXT.get(target.hair) or [f"with {hair}", f"give them {hair}", f"change to {hair}"]
    elif change == "direction":
        options = {
            "": ["now facing left", "turn to the left"],
            "right": ["now facing right", "turn to the right"],
        }[target.direction]
    elif change == "role":
        options = [f"now {target.role}", f"{target.role} instead", f"change to {target.role}"]
        if target.kind == "person":
            noun = target.role.split()[0] in ("a", "an")
            options[2] = f"turn them into {target.role}" if noun else f"show them {target.role}"
    else:  # gender+tone
        words = ("male", "female") if target.role == CHILD else ("a man", "a woman")
        who = {"": "gender-neutral", "man": words[0], "woman": words[1]}[target.gender]
        options = [f"now {who} with {tone} skin", f"{who} and with {tone} skin", f"the same but {who} with {tone} skin"]
    return choose(options, change, key)


def change_wordings(change: str, target: Attributes) -> tuple[str, ...]:
    """Three further captions for what `change_text` asks, in words that it never takes."""
    tone = target.tone or "yellow"
    words = ("male", "female") if target.role == CHILD else ("a man", "a woman")
    who = {"": "gender-neutral", "man": words[0], "woman": words[1]}[target.gender]
    side = target.direction or "left"
    hair = {"": "ordinary hair", "bald": "a bald head", "beard": "a beard"}.get(target.hair, f"{target.hair} hair")
    return {
        "tone": (f"the skin should be {tone}", f"give it {tone} skin", f"{tone} skin in place of this one"),
        "gender": (f"should be {who}", f"as before, only {who}", f"{who} this time"),
        "hair": (f"let them have {hair}", f"as before, only with {hair}", f"{hair} this time"),
        "direction": (f"should face {side}", f"looking to the {side}", f"the other way round, towards the {side}"),
        "role": (f"should be {target.role}", f"as before, only {target.role}", f"{target.role} this time"),
        "gender+tone": (
            f"should be {who} with {tone} skin",
            f"as before, only {who}, the skin {tone}",
            f"{who} and {tone} skin this time",
        ),
    }[change]


# ---------------------------------------------------------------- objects and faces: names one word apart
COLOURS = _words("red orange yellow green blue purple brown black white grey pink")
_SHARED_FIRST = COLOURS | _words("open closed small large crossed backhand thumbs")
_VAGUE_HEADS = _words("symbol sign button mark decoration flag room luggage railway water machine game card")
_MEDIA_BUTTONS = _words("play pause stop record eject reverse fast-forward next last")
_UNLIKE = frozenset(["hot dog", "light rail", "green salad", "white cane", "red envelope", "gem stone"])
_SMALL_WORDS = _words("with of in and on the a at without no")


def substitutions(names: dict[str, str]) -> list[tuple[str, str, str, str, str]]:
    """Ordered pairs whose names differ in one word: (pattern, reference id, its word, target id, its word).

    The words that stay must describe the drawing ("red heart" / "blue heart", "open" / "closed mailbox"), so a shared
    *last* word counts, a shared first word only if it is a colour or a state, and lettering is left out.
    """
    patterns: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for emoji_id, name in names.items():
        words = name.split()
        if not 2 <= len(words) <= 6 or is_people(emoji_id) or name in _UNLIKE or _is_lettering(words):
            continue
        for place, word in enumerate(words):
            stay = words[:place] + words[place + 1 :]
            if word.lower() in _SMALL_WORDS or not _describes(stay, place == len(words) - 1, word):
                continue
            pattern = " ".join([*words[:place], "*", *words[place + 1 :]])
            patterns.setdefault((pattern, _block(emoji_id)), []).append((emoji_id, word))
    return [
        (pattern, reference, before, target, after)
        for (pattern, _), members in sorted(patterns.items())
        for reference, before in members
        for target, after in members
        if reference != target
    ]


def _block(emoji_id: str) -> str:
    """Animal faces and smileys share the word "face" and nothing else, so they are kept apart."""
    code = code_points(emoji_id)[0]
    return "animal" if 0x1F400 <= code <= 0x1F43F or 0x1F980 <= code <= 0x1F9AE else ""


def _is_lettering(words: list[str]) -> bool:
    capitals = any(word.isupper() for word in words)
    numbers = any(character.isdigit() for word in words for character in word)
    return capitals or numbers or bool({"keycap", "Japanese", "input", "o’clock", "family", "latin"} & set(words))


def _describes(stay: list[str], last_changes: bool, word: str) -> bool:
    if len(stay) == 1:
        if last_changes:
            return stay[0] in _SHARED_FIRST
        return stay[0] not in _VAGUE_HEADS or (stay[0] == "button" and word in _MEDIA_BUTTONS)
    return any(other.lower() not in _SMALL_WORDS | _VAGUE_HEADS for other in stay)


def object_wordings(before: str, after: str) -> tuple[str, ...]:
    """Three further captions for what `object_text` asks, in words that it never takes."""
    return f"should be {after}, no longer {before}", f"swap {before} for {after}", f"{after} where it was {before}"


def object_text(before: str, after: str, key: str) -> str:
    """The relative caption of a one-word substitution."""
    if after in COLOURS and before in COLOURS:
        options = [f"in {after} instead of {before}", f"make it {after}", f"{after}, not {before}"]
    else:
        options = [f"{after} instead of {before}", f"now {after} rather than {before}", f"change {before} to {after}"]
    return choose(options, "object", key)
