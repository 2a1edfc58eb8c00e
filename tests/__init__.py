"""The tests, in folders that mirror the packages; `helpers` is what several of them share."""
