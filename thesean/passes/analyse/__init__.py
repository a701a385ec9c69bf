"""What a graph is: its data flow, regions, blocks, attentions, MLPs, positions and costs. Changes nothing."""
