"""`train_amf.py --publish`: checked before the run, done after it.

What it takes is imported only where the flag is given.
"""
import argparse
from pathlib import Path

from timm_amf.errors import UserError

__all__ = ['check_flags', 'publish_finished']


def check_flags(args: argparse.Namespace) -> None:
    """Checks `--publish` and what belongs to it before a run of days, not after.

    Raises:
        UserError: If repository or licence are no such, or nobody is logged in.
    """
    from timm_amf.hub.card import CardOptions
    from timm_amf.hub.publish import Target, check_target

    target = Target(args.publish, args.publish_private, args.publish_revision, args.publish_message)
    if not args.publish_license:
        raise UserError('--publish: name the licence of the weights with --publish-license, such as apache-2.0')
    CardOptions(args.publish_license)
    check_target(target)


def publish_finished(args: argparse.Namespace, folder: Path) -> None:
    """What `train_amf.py --publish` does when the run is complete.

    Raises:
        UserError: If it cannot be published; the run itself is whole, and the message says how to go on.
    """
    from timm_amf.hub.publish import publish

    try:
        publish(
            folder, args.publish, args.publish_license, private=args.publish_private,
            revision=args.publish_revision, message=args.publish_message)
    except UserError as e:
        raise UserError(
            f'{e} | the run itself is complete; publish it with: timm-amf publish {folder} --repo-id {args.publish} '
            f'--license {args.publish_license}') from e
