"""The shop's catalogue: what is sold, for how much, and how many are left.

Owns the products and the SQLite file `catalogue.db` beside this module, which is built once from a
fixed seed (`python -m examples.shop.catalogue`) and committed. Look-ups open it read-only and
immutable, so that any number of forked workers may read it at one time.
"""

from __future__ import annotations

import random
import sqlite3
from functools import cache
from pathlib import Path

CATALOGUE = Path(__file__).with_name("catalogue.db")

ADJECTIVES = ("red", "blue", "green", "white", "black", "small", "large", "old", "new", "light", "round", "plain")
NOUNS = (
    "mug", "lamp", "chair", "vase", "bowl", "plate", "clock", "basket", "candle", "pillow",
    "blanket", "kettle", "teapot", "spoon", "brush", "mirror", "frame", "shelf", "stool", "tray",
)  # fmt: skip
PRODUCTS = tuple(f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)

MAX_PRICE = 40
MAX_STOCK = 60


class UnknownProductError(ValueError):
    """No product has that name."""


@cache
def _rows() -> dict[str, tuple[int, int]]:
    with sqlite3.connect(f"file:{CATALOGUE}?mode=ro&immutable=1", uri=True) as connection:
        return {name: (price, stock) for name, price, stock in connection.execute("SELECT * FROM products")}


def price_of(product: str) -> int:
    """The price of one `product` in whole coins. Raises UnknownProductError."""
    return _look_up(product)[0]


def stock_of(product: str) -> int:
    """How many of `product` are left. Raises UnknownProductError."""
    return _look_up(product)[1]


def _look_up(product: str) -> tuple[int, int]:
    row = _rows().get(product.strip().lower())
    if row is None:
        raise UnknownProductError(f"no product is called {product!r}")
    return row


def build(path: Path) -> None:
    """Write the catalogue to `path`, the same rows every time."""
    rng = random.Random("shop catalogue")
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE TABLE products (name TEXT PRIMARY KEY, price INTEGER, stock INTEGER) WITHOUT ROWID")
        connection.executemany(
            "INSERT INTO products VALUES (?, ?, ?)",
            [(name, rng.randint(2, MAX_PRICE), rng.randint(0, MAX_STOCK)) for name in PRODUCTS],
        )
    connection.close()


if __name__ == "__main__":
    build(CATALOGUE)
