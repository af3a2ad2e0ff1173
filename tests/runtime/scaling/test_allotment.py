"""Who may have what there is not enough of for all."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from coldframe.runtime.scaling.allotment import Need, Supply, Wish, allot
from coldframe.runtime.scaling.policies import LEVELS, Level

amounts = st.integers(0, 100)
levels = st.sampled_from(LEVELS)


@st.composite
def wishes(draw: st.DrawFn) -> list[Wish]:
    found = []
    for i in range(draw(st.integers(0, 6))):
        device, part = draw(amounts), draw(st.floats(0, 1))
        needs: dict[Level, Need] = {
            "warm": Need(device, 0, draw(st.floats(0, 100))),
            "parked": Need(int(device * part), draw(amounts)),
        }
        parks = draw(st.booleans())
        found.append(
            Wish(
                f"m{i}",
                draw(levels) if parks else draw(st.sampled_from(("zero", "warm"))),
                needs,
                draw(st.floats(0, 50)),
                asked=draw(st.booleans()),
                levels=LEVELS if parks else ("zero", "warm"),
            )
        )
    return found


limits = st.none() | st.floats(0, 300)
supplies = st.builds(Supply, limits, limits, limits)


def taken(found: dict[str, Level], of: list[Wish]) -> Need:
    needs = [(wish, wish.need(found[wish.name])) for wish in of]
    return Need(
        sum(need.device for _, need in needs),
        sum(need.host for _, need in needs),
        sum(need.held_s for wish, need in needs if not wish.asked),
    )


def over(need: Need, supply: Supply) -> list[bool]:
    pairs = zip(
        (need.device, need.host, need.held_s),
        (supply.device, supply.host, supply.held_s),
        strict=True,
    )
    return [limit is not None and amount > limit + 1e-6 for amount, limit in pairs]


@given(wishes(), supplies)
def test_never_more_than_there_is_and_nobody_who_is_asked_is_put_down(
    of: list[Wish], supply: Supply
) -> None:
    found = allot(of, supply)
    assert set(found) == {wish.name for wish in of}
    for wish in of:
        assert LEVELS.index(found[wish.name]) <= LEVELS.index(wish.level)
        assert found[wish.name] in wish.levels
        assert not wish.asked or found[wish.name] == wish.level
    asked = [wish for wish in of if wish.asked]
    alone = over(taken(found, asked), supply)
    for name, too_much in enumerate(over(taken(found, of), supply)):
        if too_much and alone[name]:
            # Clients have more than there is already: nobody else has any of it.
            rest = taken(found, [wish for wish in of if not wish.asked])
            assert (rest.device, rest.host, rest.held_s)[name] <= 1e-6
        else:
            assert not too_much


@given(wishes(), supplies)
def test_nobody_is_put_down_who_would_fit(of: list[Wish], supply: Supply) -> None:
    found = allot(of, supply)
    for wish in of:
        between = LEVELS[LEVELS.index(found[wish.name]) + 1 : LEVELS.index(wish.level) + 1]
        for level in between:
            if level not in wish.levels:
                continue
            tried = over(taken({**found, wish.name: level}, of), supply)
            need = wish.need(level)
            amounts = (need.device, need.host, need.held_s)
            assert any(bad for bad, amount in zip(tried, amounts, strict=True) if amount > 0)


@given(wishes(), supplies, st.data())
def test_to_save_clients_more_never_leads_lower(
    of: list[Wish], supply: Supply, data: st.DataObject
) -> None:
    if not of:
        return
    place = data.draw(st.integers(0, len(of) - 1))
    more = [*of]
    more[place] = replace(of[place], benefit=of[place].benefit + data.draw(st.floats(0, 100)))
    name = of[place].name
    before, after = allot(of, supply)[name], allot(more, supply)[name]
    assert LEVELS.index(after) >= LEVELS.index(before)


@given(wishes())
def test_where_there_is_enough_each_is_what_it_would_be(of: list[Wish]) -> None:
    assert allot(of, Supply()) == {wish.name: wish.level for wish in of}
    enough = Supply(1000, 1000, 1000)
    assert allot(of, enough) == {wish.name: wish.level for wish in of}


def test_those_that_save_least_for_what_they_take_go_first() -> None:
    def wish(name: str, device: float, benefit: float) -> Wish:
        return Wish(name, "warm", {"warm": Need(device), "parked": Need(device / 4)}, benefit)

    of = [wish("large", 80, 10.0), wish("small", 20, 5.0), wish("never", 40, 0.1)]
    assert allot(of, Supply(device=100)) == {"small": "warm", "large": "warm", "never": "zero"}
    assert allot(of, Supply(device=60)) == {"small": "warm", "large": "parked", "never": "parked"}
    asked = [*of[:2], replace(of[2], asked=True)]
    assert allot(asked, Supply(device=60)) == {"small": "warm", "large": "zero", "never": "warm"}
