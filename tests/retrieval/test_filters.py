"""Filters: what they mean, by hand; the condition of SQLite against the function of one picture; hostile texts."""

import json
import math
import random
import sqlite3

import pytest

from neucore_plugin.common.errors import DataError
from neucore_plugin.retrieval import filters
from neucore_plugin.retrieval.filters import And, Contains, Field, Not, OneOf, Or, Order, Present, parse

PRICE, TAGS = Field(("price",)), Field(("tags",))
TREES = {
    'category == "dress" and price < 50': And((OneOf(Field(("category",)), ("dress",)), Order(PRICE, "<", 50))),
    "50 > price": Order(PRICE, "<", 50),
    "10 <= price < 50": And((Order(PRICE, ">=", 10), Order(PRICE, "<", 50))),
    "price == -5": OneOf(PRICE, (-5,)),
    "sale or not (price > 1.5)": Or((OneOf(Field(("sale",)), (True,)), Not(Order(PRICE, ">", 1.5)))),
    "sale == False": OneOf(Field(("sale",)), (False,)),
    "'red' in tags": Contains(TAGS, "red"),
    "'red' not in tags": And((Present(TAGS), Not(Contains(TAGS, "red")))),
    "tags in ['a', 2, true]": OneOf(TAGS, ("a", 2, True)),
    "price != 3": And((Present(PRICE), Not(OneOf(PRICE, (3,))))),
    "price == null": Not(Present(PRICE)),
    "price != None": Present(PRICE),
    "price in (1, null)": Or((OneOf(PRICE, (1,)), Not(Present(PRICE)))),
    "shop.city == 'Bern'": OneOf(Field(("shop", "city")), ("Bern",)),
    "attributes['unit price'].eur < 2": Order(Field(("unit price", "eur")), "<", 2),
    "name == 'a.png'": OneOf(Field(("name",), own=True), ("a.png",)),
    "attributes['name'] == 'a.png'": OneOf(Field(("name",)), ("a.png",)),
    "'holiday/' in path": Contains(Field(("path",), own=True), "holiday/"),
    "price < 99999999999999999999": Order(PRICE, "<", 1e20),
}


@pytest.mark.parametrize("text", TREES)
def test_what_is_read(text):
    assert parse(text) == TREES[text]
    assert parse(f"\n ( {text} ) ") == TREES[text]


ROW = {
    "category": "dress",
    "price": 49.5,
    "sale": True,
    "tags": ["red", "dark blue", 7],
    "shop": {"city": "Zürich", "floor": None},
    "empty": [],
    "none": None,
    "größe": 38,
    "unit price": 1,
    "name": "other",
}
MEANS = {  # on that row, whose picture is a/b.png
    "price < 50 and price >= 49.5": True,
    "price < 49.5": False,
    "49 < price < 50": True,
    "price == '49.5'": False,  # kinds are not mixed
    "price < '50'": False,
    "sale == 1": False,
    "sale": True,
    "not sale": False,
    "price": False,  # a number is not true
    "category == 'Dress'": False,
    "category > 'dres'": True,
    "'res' in category": True,
    "'res' not in category": False,
    "'red' in tags": True,
    "'blue' in tags": False,  # an element, not a part of one
    "7 in tags and 7.0 in tags": True,
    "tags == 'dark blue'": True,
    "tags != 'red'": False,
    "tags > 6": True,
    "tags != 'green'": True,
    "category in ('coat', 'dress')": True,
    "category not in ('coat', 'dress')": False,
    "category in ()": False,
    "shop.city == 'Zürich'": True,
    "shop == 'Zürich'": False,
    "shop != null": True,
    "größe >= 38": True,
    "attributes['unit price'] == 1": True,
    "name == 'a/b.png'": True,
    "attributes['name'] == 'other'": True,
    "name == 'other'": False,
    "name == 5": False,
    "name != 5": True,
    "'/b' in name": True,
    "path == null": False,
    "'pictures/' in path": True,
    "missing == 1": False,
    "missing != 1": False,
    "missing < 1 or missing >= 1": False,
    "not missing < 1": True,
    "missing == null": True,
    "missing != null": False,
    "none == null and empty == null and shop.floor == null": True,
    "empty != 1": False,
    "none in (1, null)": True,
    "category.deeper == 'x'": False,
    "'x' in missing": False,
    "'' in category": True,
}


def table(rows):
    """As an index keeps them: (name, path, attributes) -> a database, names that are no UTF-8 as bytes."""
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE rows(row INTEGER PRIMARY KEY, name, path, attributes TEXT)")
    for number, (name, path, attributes) in enumerate(rows):
        kept = [text if text.isascii() else text.encode("utf-8", "surrogatepass") for text in (name, path)]
        connection.execute(
            "INSERT INTO rows VALUES (?, ?, ?, ?)", (number, *kept, json.dumps(attributes) if attributes else None)
        )
    return lambda sql, values: connection.execute(sql, values).fetchall()


@pytest.mark.parametrize("text", MEANS)
def test_what_it_means(text):
    assert filters.matches(parse(text), "a/b.png", "pictures/a/b.png", ROW) is MEANS[text]
    select = table([("a/b.png", "pictures/a/b.png", ROW)])
    assert filters.rows_passing(parse(text), select) == [0] * MEANS[text]


TEXTS = [
    "",
    "red",
    "dark red",
    "re",
    "Zürich",
    "日本",
    "😀",
    "it's",
    'say "x"',
    "a\\b",
    "%_",
    "'); DROP TABLE rows; --",
]
TEXTS += ["null", "true", "5", "x\ny", "\udc80", "\ufffd", "$.a"]
NUMBERS = [0, -1, 5, 5.0, 2.5, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, 2**70, 10**400, 1e300, -0.0]
NAMES = ["a", "b", "größe", "😀", "unit price", "it's", "back\\slash", "$", "a.b", "line\nend", "class"]


def some_value(draw, depth=0):
    kind = draw.randrange(7 if depth < 2 else 4)
    if kind == 4:
        return [some_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 5:
        return {draw.choice(NAMES): some_value(draw, depth + 1) for _ in range(draw.randrange(4))}
    if kind == 3:
        return draw.choice([None, True, False])
    return draw.choice(NUMBERS) if kind == 2 else draw.choice(TEXTS)


def some_filter(draw, depth=0):
    kind = draw.randrange(8 if depth < 3 else 5)
    if kind >= 5:
        parts = [some_filter(draw, depth + 1) for _ in range(draw.randrange(1, 4))]
        return f"(not {parts[0]})" if kind == 5 else "(" + draw.choice([" and ", " or "]).join(parts) + ")"
    keys = [draw.choice(NAMES) for _ in range(draw.choice([1, 1, 1, 2]))]
    field = draw.choice(["name", "path", *["attributes" + "".join(f"[{key!a}]" for key in keys)] * 6])
    value = draw.choice([draw.choice(TEXTS), draw.choice(NUMBERS), draw.choice([True, False])])
    if kind == 4:
        return f"{field} {draw.choice(['==', '!='])} null"
    if kind == 3:
        return f"{field} {draw.choice(['in', 'not in'])} ({value!a}, {draw.choice(TEXTS)!a}, null)"
    if kind == 2:
        return f"{value!a} {draw.choice(['in', 'not in'])} {field}"
    signs = ["==", "!="] if isinstance(value, bool) else ["==", "!=", "<", "<=", ">", ">="]
    return f"{field} {draw.choice(signs)} {value!a}"


@pytest.mark.parametrize("seed", range(20))
def test_sqlite_means_what_the_function_means(seed):
    draw = random.Random(seed)
    rows = []
    for _ in range(60):
        attributes = {draw.choice(NAMES): some_value(draw) for _ in range(draw.randrange(8))}
        rows.append((draw.choice(TEXTS), draw.choice(TEXTS), attributes))
    select, passed = table(rows), 0
    for _ in range(60):
        text = some_filter(draw)
        tree = parse(text)
        expected = [number for number, row in enumerate(rows) if filters.matches(tree, *row)]
        assert filters.rows_passing(tree, select) == expected, text
        passed += 0 < len(expected) < len(rows)
    assert passed > 10  # enough of them divide the rows
    assert select("SELECT count(*) FROM rows", []) == [(60,)]


def test_nothing_of_the_text_is_in_the_condition():
    sql, values = filters.condition(parse("attributes['evil\\'); --'] == 'x\\'; DROP' and name in ('nobody\\'',)"))
    assert "evil" not in sql and "DROP" not in sql and "nobody" not in sql
    assert {"x'; DROP", "nobody'"} < set(values)


def test_damaged_numbers_are_missing():
    for text, expected in {"a == null": True, "a < 1 or a >= 1 or a == a1": False, "a != 1": False}.items():
        tree = parse(text.replace(" or a == a1", ""))
        assert filters.matches(tree, "n", "p", {"a": math.nan}) is expected


BAD = {
    "": "an empty filter",
    "category == dress": 'category and dress are both names of attributes; put a text in quotes: category == "dress"',
    "price = 5": "write == for equal",
    "a == 1 && b == 2": "write `and`, `or`, `not`",
    "a == 1 AND b == 2": "write `and`, `or`, `not`",
    "price <": "not understood",
    "true": "true is no comparison",
    "name": "name is no comparison",
    "name and price < 3": "name is no comparison",
    "1 == 1": "neither is the name of an attribute",
    "price is null": "`is` compares nothing here; write == or !=",
    "price < true": "true has no order",
    "price < null": "null is no value here",
    "null in tags": "null is no value here",
    "len(tags) > 3": r"len\(tags\) is no value|neither is the name",
    "__import__('os').system('x')": "is no comparison",
    "name.first == 'x'": r'name is a text without parts.*attributes\["name"\]',
    "price in 'abc'": "after `in` stands a list, such as",
    "a[0] == 1": "in brackets stands an attribute's name in quotes",
    "attributes['a\"b'] == 1": 'with " in it cannot be filtered by',
    "price == 1j": "1j is no value here",
    "price == -'a'": "'a' is no number",
    "price == b'x'": "is no value here",
    "price == f'{x}'": "is no value here",
    "price + 1 == 2": "neither is the name of an attribute",
    "(lambda: 1)": "is no comparison",
    "(x := 5)": "is no comparison",
    "[x for x in y]": "is no comparison",
    "x == '\0'": "not understood",
    "x == '\ud800'": "not understood",
    "x == " + "9" * 5000: "not understood",
    "(" * 400 + "x" + ")" * 400: "not understood",
    "not " * 20 + "x": "too deeply nested",
    "not " * 4900 + "x": "too deeply nested",
    "x" * 20_001: "20001 characters; at most 20000",
    "x or " * 200 + "x": "201 comparisons; at most 200",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_what_is_refused(text):
    with pytest.raises(DataError, match=BAD[text]) as caught:
        parse(text)
    assert len(str(caught.value)) < 400


def test_the_largest_filters_are_taken_by_sqlite():
    select = table([("a", "b", {"x": True})])
    deep = "('re' in x or x) and (x or " * 9 + "not ('re' in x)" + ")" * 9
    for text in ("x and " * 199 + "x", "not " * 18 + "x", f"x and name in ({'1, ' * 6000}'a')", deep):
        tree = parse(text)
        assert filters.rows_passing(tree, select) == [0] and filters.matches(tree, "a", "b", {"x": True}), text[:40]


def test_an_attribute_that_no_picture_has():
    tables = [
        table([("a", "a", {"category": 1, "shop": {"city": "x"}})]),
        table([("b", "b", {"größe": 3}), ("c", "c", {})]),
    ]
    for text in ("category == 'x'", "größe < 1 or shop.city == 'y'", "name == 'x'"):
        filters.check_attributes(parse(text), tables)
    cases = {
        "catgory == 1": r"has an attribute 'catgory'. Did you mean 'category'\? There are: category, größe, shop",
        "shop.citty == 1": r"'shop.citty'. Did you mean 'shop.city'\? There are: shop.city",
        "not (category == 1 and prise < 3)": "no picture has an attribute 'prise'. There are: category",
    }
    for text, message in cases.items():
        with pytest.raises(DataError, match=message):
            filters.check_attributes(parse(text), tables)
    with pytest.raises(DataError, match="'price', or any other; filter by name or path"):
        filters.check_attributes(parse("price < 1"), [table([("a", "a", {})])])
