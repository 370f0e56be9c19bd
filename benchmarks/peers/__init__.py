"""Other systems beside treeflash: same weights, prompts, type, threads and token counts."""
