"""`python -m sparse_transformer`: the programs of the package."""

from sparse_transformer import program

PROGRAMS = {
    "train": "trains a weight-sparse transformer on Python code",
    "generate": "continues a prompt",
    "evaluate": "asks a model the 20 tasks",
    "tasks": "lists the tasks, shows one, or writes its prompts to train on",
    "circuits": "finds, validates and draws the circuit of a task",
    "browse": "writes a page with every neuron, channel and head of a model",
    "steer": "changes or ablates activations, and counts the answers that flip",
    "bridges": "steers a dense model through a sparse one",
    "export": "writes a model without the state of its training",
}

if __name__ == "__main__":
    rows = [(f"python -m sparse_transformer.{name}", said) for name, said in PROGRAMS.items()]
    print(program.table(rows, left=2), end="")
    print("--help of each lists its options; --checkpoint python-small is a model to begin with.")
