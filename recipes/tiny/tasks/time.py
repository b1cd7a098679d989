"""Calendar, clock and unit conversion."""

from random import Random

from recipes.tiny.tasks.task import MakeTask, Task, ask, words

WEEKDAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = (
    ("January", 31),
    ("February", 28),
    ("March", 31),
    ("April", 30),
    ("May", 31),
    ("June", 30),
    ("July", 31),
    ("August", 31),
    ("September", 30),
    ("October", 31),
    ("November", 30),
    ("December", 31),
)
# large unit, small unit, how many small ones make a large one
UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("euros", "cents", 100),
    ("feet", "inches", 12),
)


def weekday(rng: Random) -> Task:
    """Count days forward or back from a weekday."""
    start, days = rng.randrange(7), rng.randrange(2, 100)
    step, word = rng.choice(((1, "after"), (-1, "before")))
    weeks, rest = divmod(days, 7)
    lines = [f"{days} = {weeks} x 7 + {rest}, so count {rest} days from {WEEKDAYS[start]}."]
    lines += [f"{i}: {WEEKDAYS[(start + step * i) % 7]}" for i in range(1, rest + 1)]
    lines.append(f"Answer: {WEEKDAYS[(start + step * days) % 7]}")
    prompt = ask(
        rng,
        f"Which weekday is {days} days {word} {WEEKDAYS[start]}?",
        f"What day of the week comes {days} days {word} a {WEEKDAYS[start]}?",
    )
    return Task(prompt, "\n".join(lines), f"{days} {word} {WEEKDAYS[start]}")


def date(rng: Random) -> Task:
    """Find the date some days later, in a common year."""
    month = rng.randrange(12)
    name, length = MONTHS[month]
    day, days = rng.randrange(1, length + 1), rng.randrange(2, 29)
    following = MONTHS[(month + 1) % 12][0]
    lines = [f"{name} has {length} days.", f"{day} + {days} = {day + days}."]
    if day + days <= length:
        lines.append(f"{day + days} is not more than {length}, so it is still {name}.")
        answer = f"{day + days} {name}"
    else:
        left = day + days - length
        lines.append(f"{day + days} is more than {length}, so it is in {following}.")
        lines.append(f"{day + days} - {length} = {left}.")
        answer = f"{left} {following}"
    lines.append(f"Answer: {answer}")
    prompt = ask(
        rng,
        f"What date is {days} days after {day} {name}? It is not a leap year.",
        f"Which date comes {days} days after {day} {name} in a common year?",
    )
    return Task(prompt, "\n".join(lines), f"{days} after {day} {name}")


def clock(rng: Random) -> Task:
    """Add a duration to a time of day."""
    hour, minute = rng.randrange(24), rng.randrange(60)
    hours, minutes = rng.randrange(1, 10), rng.randrange(1, 60)
    end_hour, end_minute = hour + hours, minute + minutes
    lines = [
        f"Hours: {hour} + {hours} = {end_hour}.",
        f"Minutes: {minute} + {minutes} = {end_minute}.",
    ]
    if end_minute >= 60:
        lines.append(f"{end_minute} minutes is 1 hour and {end_minute - 60} minutes.")
        lines.append(f"Hours: {end_hour} + 1 = {end_hour + 1}.")
        end_hour, end_minute = end_hour + 1, end_minute - 60
    if end_hour >= 24:
        lines.append(f"Past midnight: {end_hour} - 24 = {end_hour - 24}.")
        end_hour -= 24
    lines.append(f"Answer: {end_hour:02}:{end_minute:02}")
    start = f"{hour:02}:{minute:02}"
    thing = rng.choice(("train", "bus", "film", "ferry", "meeting", "concert"))
    prompt = ask(
        rng,
        f"A {thing} starts at {start} and takes {hours} hours and {minutes} minutes. "
        "When does it end?",
        f"What time is it {hours} hours and {minutes} minutes after {start}?",
        f"It is {start}. What time will it be in {hours} hours and {minutes} minutes?",
    )
    return Task(prompt, "\n".join(lines), f"{start} plus {hours}:{minutes}")


def convert(rng: Random) -> Task:
    """Convert a whole number of large units into small ones."""
    large, small, factor = rng.choice(UNITS)
    value = rng.randrange(2, 100)
    lines = [f"One of the {large} is {factor} {small}."]
    tens, ones = value // 10 * 10, value % 10
    if tens and ones:
        lines.append(f"{tens} x {factor} = {tens * factor}")
        lines.append(f"{ones} x {factor} = {ones * factor}")
        lines.append(f"{tens * factor} + {ones * factor} = {value * factor}")
    else:
        lines.append(f"{value} x {factor} = {value * factor}")
    lines.append(f"Answer: {value * factor} {small}")
    prompt = ask(
        rng,
        f"Convert {value} {large} to {small}.",
        f"How many {small} are {value} {large}?",
        f"Express {value} {large} in {small}.",
    )
    return Task(prompt, "\n".join(lines), f"{value} {large} in {small}")


TIME_KINDS: dict[str, MakeTask] = {
    "weekday": weekday,
    "date": date,
    "clock": clock,
    "convert": convert,
}
