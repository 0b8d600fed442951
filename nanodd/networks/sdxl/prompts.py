"""Prompts: the names of the classes as people write them, in a template such as "a photo of a {}"."""
import re

from nanodd.errors import UserError


def written_name(name, lemmas):
    """A class's name in words: "lawn_mower" -> "lawn mower", and "n01443537" -> "goldfish", out of `lemmas`.

    lemmas: WordNet id -> its synonyms, joined by commas; raises KeyError for an unknown one. Only the first
    synonym is taken, so that three pairs of ImageNet's 1,000 classes share a name, save for upper case: crane
    (a bird, a machine), cardigan (a dog, a jacket) and maillot (tights, a bathing suit).
    """
    if re.fullmatch(r"n\d{8}", name):
        return lemmas(name).split(",")[0]
    return name.replace("_", " ")


def prompts_of(classes, template="{}"):
    """The prompts of `classes`, K names: WordNet ids, CIFAR's names or those of anybody's folders.

    template: a text in which every {} is replaced by the name. Raises UserError where it has no {}, or where
    a class is a WordNet id that is not among the 21,844 of timm's table.
    """
    from timm.data import ImageNetInfo                          # a slow import: only where it is needed

    if "{}" not in template:
        raise UserError(f"the prompt {template!r} has no {{}}, the place of the class's name: without it all "
                        "classes would look alike")
    lemmas = ImageNetInfo().label_name_to_description
    try:
        return [template.replace("{}", written_name(name, lemmas)) for name in classes]
    except KeyError as error:
        raise UserError(f"the class {error.args[0]} looks like a WordNet id, but no such id is known: give "
                        "its folder a name in words, since that is the prompt") from error
