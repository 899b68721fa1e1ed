"""Fuzzing of everything that strangers give: ``make fuzz``, or ``python -m tests.fuzz COMMAND`` for one kind of input.

Each command runs a number of mutated inputs through the functions that read such inputs, in processes of their own. A
fault is an exception that is none of ours, a case over its limit of time, a process that dies, memory that grows, a
file opened outside the allowed folders, a program started, a connection to an address that is not public.
"""
