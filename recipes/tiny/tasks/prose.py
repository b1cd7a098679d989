"""Free wording: explanations, e-mails, stories and advice.

The parts are drawn at random, so a prompt has many good answers and none that is the right one.
"""

from random import Random

from recipes.tiny.tasks.task import MakeTask, Task, ask, words
from recipes.tiny.tasks.text import WORDS

AUDIENCES = (
    "a child", "a beginner", "a student", "a colleague", "my grandmother", "a tourist",
    "a new employee", "a curious reader", "a teenager", "a friend",
)  # fmt: skip
# topic -> facts; an answer uses three to five of them, in any order
TOPICS = {
    "rain": (
        "Water from seas and lakes rises into the air as vapour.",
        "High above the ground the vapour cools and forms tiny drops.",
        "The drops gather in clouds until they become too heavy.",
        "Wind carries the clouds over the land.",
        "In the end the drops fall and the water flows back to the sea.",
    ),
    "photosynthesis": (
        "Plants catch sunlight with the green colour in their leaves.",
        "They take in water through their roots.",
        "Small openings in the leaves let carbon dioxide in.",
        "With this energy the plant builds sugar.",
        "Oxygen is left over and goes into the air that we breathe.",
    ),
    "a computer program": (
        "A program is a list of instructions for a machine.",
        "The machine follows the instructions one after another.",
        "Some instructions compare values and choose what happens next.",
        "Others repeat a part of the list many times.",
        "A mistake in one line can change the whole result.",
    ),
    "a battery": (
        "A battery stores energy in chemical form.",
        "It has two ends with different materials.",
        "When a wire joins the ends, charges move through it.",
        "The moving charges can light a lamp or turn a motor.",
        "Some batteries can be charged again and used for years.",
    ),
    "the moon": (
        "The moon travels around the earth in about four weeks.",
        "It has no light of its own and shines because the sun shines on it.",
        "We see a different part of the bright side every night.",
        "Its pull makes the sea rise and fall.",
        "People have walked on it and brought stones back.",
    ),
    "money": (
        "Money makes it easy to trade one thing for another.",
        "Long ago people used shells, salt and metal.",
        "Today most money is only a number in a bank.",
        "Prices rise when many people want the same thing.",
        "Saving a little each month helps in hard times.",
    ),
    "a bicycle": (
        "A bicycle turns the strength of your legs into motion.",
        "The pedals pull a chain, and the chain turns the back wheel.",
        "Gears let you choose between strength and speed.",
        "The turning wheels help the bicycle to stay upright.",
        "Brakes press on the wheels and slow them down.",
    ),
    "sleep": (
        "Sleep gives the body time to repair itself.",
        "The brain sorts what happened during the day.",
        "Dreams come most often in the early morning.",
        "Children need more sleep than adults.",
        "A dark and quiet room helps to fall asleep.",
    ),
    "bread": (
        "Bread begins with flour, water and salt.",
        "Yeast eats the sugar in the dough and makes gas.",
        "The gas forms bubbles, and the dough rises.",
        "Kneading makes the dough strong and smooth.",
        "The heat of the oven turns it into a loaf with a crust.",
    ),
    "a library": (
        "A library lends books to everyone who asks.",
        "The shelves are ordered so that each book can be found.",
        "A librarian helps readers with their questions.",
        "Many libraries also lend films and music.",
        "It is a quiet place to read and to learn.",
    ),
    "volcanoes": (
        "Deep under the ground it is so hot that rock melts.",
        "The melted rock pushes upwards through cracks.",
        "When the pressure is too high, the volcano erupts.",
        "Lava flows down the sides and becomes new land.",
        "The ash makes the soil around it rich.",
    ),
    "recycling": (
        "Recycling turns old things into new material.",
        "Glass and metal can be melted many times.",
        "Paper becomes pulp and then paper again.",
        "It saves energy and keeps waste out of nature.",
        "It works best when people sort their waste at home.",
    ),
}
OPENINGS = (
    "Here is a short explanation of {topic}, written for {audience}.",
    "Let us look at {topic} in plain words, so that {audience} can follow.",
    "For {audience}, {topic} is easier to understand than it seems.",
)
LINKS = ("It helps to know this: ", "Also, ", "Besides, ", "In addition, ", "", "")
CLOSINGS = (
    "That is the main idea of {topic}.",
    "In short, this is how to think about {topic}.",
    "With these points in mind, {topic} makes sense.",
)
FRIENDS = words("Anna Ben Carla David Elena Felix Greta Henry Irene James Katya Liam Maria Nora")
OCCASIONS = (
    ("the team meeting", "we need to agree on the plan for the next month"),
    ("a birthday party", "I would like to celebrate with all of my friends"),
    ("the project report", "the last numbers are still missing"),
    ("a dinner at my house", "I have found a new recipe and want to try it"),
    ("the garden work", "the trees have to be cut before winter"),
    ("a trip to the lake", "the weather should be warm and dry"),
    ("the job interview", "we were happy with your letter and want to meet you"),
    ("the broken printer", "nobody on our floor can print at the moment"),
    ("the English course", "the group is almost full"),
    ("a concert", "I have two tickets and one of them is for you"),
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
ANIMALS = words("fox owl bear rabbit hedgehog mouse swan wolf otter badger crow deer")
PLACES = (
    "forest", "village by the sea", "valley", "garden", "small island", "mountain hut",
    "town with a market", "desert",
)  # fmt: skip
HABITS = (
    ("sleeping better", ("go to bed at the same time every day", "keep the room dark and cool",
                         "leave the phone in another room", "read a few pages of a calm book",
                         "avoid coffee in the afternoon")),
    ("learning a language", ("learn ten new words every morning", "listen to songs and stories",
                             "speak with somebody once a week", "write a short diary",
                             "repeat old lessons before new ones")),
    ("saving money", ("write down what you spend", "cook at home more often",
                      "wait one day before you buy something", "put a small sum aside each week",
                      "compare prices before a large purchase")),
    ("working in a team", ("say early what you need", "listen before you answer",
                           "write decisions down", "thank people for their help",
                           "ask when something is unclear")),
    ("running a longer distance", ("begin slowly", "run three times a week",
                                   "rest one day after a long run", "drink enough water",
                                   "buy shoes that fit")),
    ("keeping plants alive", ("water them once a week", "give them enough light",
                              "turn the pots now and then", "remove dry leaves",
                              "use larger pots when the roots need room")),
    ("writing clearly", ("use short sentences", "choose plain words", "put the main point first",
                         "delete what nobody needs", "read the text aloud")),
    ("preparing an exam", ("make a plan for every week", "explain the topic to a friend",
                           "solve old exercises", "take short breaks",
                           "sleep well before the day")),
)  # fmt: skip
REASONS = (
    "This is a small step, but it changes a lot.",
    "Most people notice a difference after two weeks.",
    "It sounds simple, and that is why it works.",
    "Do not worry if you forget it once.",
    "It costs nothing and you can begin today.",
)


def explain(rng: Random) -> Task:
    """Explain a topic to somebody in five to seven sentences."""
    topic, audience = rng.choice(sorted(TOPICS)), rng.choice(AUDIENCES)
    facts = rng.sample(TOPICS[topic], rng.randrange(3, 6))
    links = rng.sample(LINKS, len(facts) - 1)
    body = [facts[0]]
    body += [
        f"{link}{fact[0].lower()}{fact[1:]}" if link else fact
        for link, fact in zip(links, facts[1:], strict=True)
    ]
    sentences = [rng.choice(OPENINGS), *body, rng.choice(CLOSINGS)]
    answer = " ".join(sentences).replace("{topic}", topic).replace("{audience}", audience)
    count = len(sentences)
    prompt = ask(
        rng,
        f"Explain {topic} to {audience} in {count} sentences.",
        f"How would you explain {topic} to {audience}? Use {count} sentences.",
        f"Write {count} sentences about {topic} for {audience}.",
    )
    return Task(prompt, answer, f"explain {topic} to {audience} in {count}", exact=False)


def email(rng: Random) -> Task:
    """Write a short e-mail."""
    sender, to = rng.sample(FRIENDS, 2)
    (subject, because), day, hour = rng.choice(OCCASIONS), rng.choice(DAYS), rng.randrange(8, 21)
    parts = (
        f"Subject: {subject[0].upper()}{subject[1:]} on {day}",
        f"{rng.choice(('Dear', 'Hello', 'Hi'))} {to},",
        rng.choice(("I hope you are well.", "Thank you for your last message.", "I hope this week"
                    " has been good to you."))
        + f" I am writing about {subject} on {day} at {hour}:00. "
        + rng.choice(("The reason is simple: ", "As you may know, ", "To be honest, "))
        + f"{because}.",
        rng.choice(("We have not seen each other for a long time, and there is much to tell.",
                    "I have already told the others, and most of them will be there.",
                    "It should not take more than two hours of your time."))
        + " " + rng.choice(("There is nothing that you need to bring.",
                            "A pen and some paper are all that you need.",
                            "I will send the details in a second message.")),
        rng.choice(("Please tell me by the day before if you can come.",
                    "It would help me a lot if you could answer soon.",
                    "Let me know if another day suits you better."))
        + rng.choice((" If you have questions, call me at any time.",
                      " I am looking forward to your answer.", "")),
        f"{rng.choice(('Best wishes', 'Kind regards', 'See you soon'))},\n{sender}",
    )  # fmt: skip
    prompt = ask(
        rng,
        f"Write a short e-mail from {sender} to {to} about {subject} on {day} at {hour}:00.",
        f"{sender} needs an e-mail to {to} about {subject} ({day}, {hour}:00). Write it.",
    )
    content = f"email {sender} {to} {subject} {day} {hour}"
    return Task(prompt, "\n\n".join(parts), content, exact=False)


def story(rng: Random) -> Task:
    """Tell a story about an animal that finds something."""
    animal, place, thing = rng.choice(ANIMALS), rng.choice(PLACES), rng.choice(WORDS)
    friend = rng.choice([other for other in ANIMALS if other != animal])
    sentences = (
        rng.choice((f"Once upon a time a young {animal} lived in a {place}.",
                    f"In a {place} there lived a {animal} who was never bored.",
                    f"Long ago, a {animal} came to a {place} and decided to stay.")),
        rng.choice((f"One morning the {animal} saw the word \"{thing}\" written in the sand.",
                    f"One day the {animal} heard somebody whisper the word \"{thing}\".",
                    f"Every night the {animal} dreamed of one word: \"{thing}\".")),
        rng.choice(("Nobody knew what it meant.", "What could it mean?",
                    "It sounded like a secret.")),
        rng.choice((f"So the {animal} went to ask the old {friend}, who knew many things.",
                    f"The {animal} told the {friend} about it, and they set out together.",
                    f"Only the {friend} was brave enough to help.")),
        rng.choice(("They walked for three days and crossed a cold river.",
                    "They looked under every stone and behind every tree.",
                    "They asked everyone they met, but nobody had an answer.")),
        rng.choice(("When it grew dark, they slept under a tree and listened to the wind.",
                    f"On the way, the {friend} sang a song that nobody else remembered.",
                    "The nights were long, but neither of them wanted to go home.")),
        rng.choice((f"A stranger gave them a map, and \"{thing}\" was its only word.",
                    f"They found a door, and above it stood \"{thing}\" in golden letters.",
                    f"An echo in the rocks said \"{thing}\" again and again.")),
        rng.choice((f"At last the {friend} laughed and said: \"We were looking too far away.\"",
                    f"In the end the {animal} sat down and began to think.",
                    f"Then the wind turned, and the {animal} understood.")),
        rng.choice((f"The {animal} shared the secret with everyone, and they were happy.",
                    f"From that day on, the {animal} and the {friend} were good friends.",
                    "And if you are very quiet, you can still hear them tell it.")),
    )  # fmt: skip
    prompt = ask(
        rng,
        f'Tell a short story about a {animal} in a {place} with the word "{thing}".',
        f'Write a story: a {animal}, a {place}, and the word "{thing}".',
    )
    content = f"story {animal} {place} {thing}"
    return Task(prompt, " ".join(sentences), content, exact=False)


def advise(rng: Random) -> Task:
    """Give numbered advice, each point with a reason."""
    goal, steps = rng.choice(HABITS)
    audience, count = rng.choice(AUDIENCES), rng.randrange(3, 6)
    lines = [
        rng.choice((f"Here are {count} ideas for {goal}, meant for {audience}:",
                    f"{count} things can help {audience} with {goal}:"))
    ]  # fmt: skip
    for number, step in enumerate(rng.sample(steps, count), 1):
        lines.append(f"{number}. {step[0].upper()}{step[1:]}. {rng.choice(REASONS)}")
    lines.append(rng.choice(("Good luck!", "Start with the first one and be patient.")))
    prompt = ask(
        rng,
        f"Give {audience} {count} pieces of advice on {goal}.",
        f"What are {count} good tips for {audience} about {goal}?",
    )
    content = f"advise {audience} {count} {goal}"
    return Task(prompt, "\n".join(lines), content, exact=False)


PROSE_KINDS: dict[str, MakeTask] = {
    "explain": explain,
    "email": email,
    "story": story,
    "advise": advise,
}
