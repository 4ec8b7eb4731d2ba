"""Trained heads that draft from the target's hidden states, and their files."""

from adaptspec.heads.attached import MedusaTrained as MedusaTrained
from adaptspec.heads.attached import open_medusa as open_medusa
