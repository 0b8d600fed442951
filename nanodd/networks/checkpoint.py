"""What a checkpoint says of itself."""
from nanodd.errors import UserError


def check_settings(found, wanted, path):
    """Refuses to go on with `path` if it was made with other settings (dicts), and names the difference."""
    other = [f"{key} {found.get(key)!r} there, {wanted.get(key)!r} here" for key in sorted({*found, *wanted})
             if found.get(key) != wanted.get(key)]
    if other:
        raise UserError(f"{path} was made with other settings ({'; '.join(other)}): "
                        f"choose --out ELSEWHERE, or --overwrite to replace it")
