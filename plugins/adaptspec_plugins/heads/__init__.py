"""Trained heads that draft from the target's hidden states, and their files."""

from adaptspec_plugins.heads.attached import MedusaTrained as MedusaTrained
from adaptspec_plugins.heads.attached import open_medusa as open_medusa
