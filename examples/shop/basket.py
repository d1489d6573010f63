"""The customer's basket, which a rollout keeps in its state: how many of each item."""

from __future__ import annotations

from examples.shop.catalogue import price_of


def add(basket: dict[str, int], item: str, quantity: int) -> int:
    """Add `quantity` of `item` to `basket` and return how many of it are in there now.

    Raises UnknownProductError, and ValueError for a quantity below 1.
    """
    price_of(item)
    if quantity < 1:
        raise ValueError(f"quantity is {quantity}; it must be at least 1")
    basket[item] = basket.get(item, 0) + quantity
    return basket[item]


def total(basket: dict[str, int]) -> int:
    """The price of everything in `basket`."""
    return sum(price_of(item) * quantity for item, quantity in basket.items())
