"""Other systems beside treeflash: the same weights, prompts, types, threads and token counts."""
