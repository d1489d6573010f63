"""The demo: one night at the shop, told on the terminal and measured.

python -m examples.shop.night            (or: make demo)
"""
