"""castbench: a benchmark of models that read a crystal as a graph, as text, or as both."""
