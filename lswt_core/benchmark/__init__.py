"""Speed and memory, beside something: subjects that do the same work, measured in one process, in
turn, many times over.
"""
