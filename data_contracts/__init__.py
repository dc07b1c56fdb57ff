"""Task contracts: what a business task's data must be, how it is checked, and how it is told to people."""

from data_contracts.contract import TaskContract, load_contract
from data_contracts.errors import UserError

__all__ = ["TaskContract", "UserError", "load_contract"]
