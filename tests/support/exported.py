"""What an exported program contains."""

import torch


def ops(program):
    """The names of the ops in a program and in its subgraphs."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
