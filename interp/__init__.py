"""Questions asked of Othello-GPT: probes, attribution, patching, and the pictures of their answers."""
