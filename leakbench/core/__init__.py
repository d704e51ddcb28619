"""What every room uses: the nouns, components and their registry, random numbers, text, devices."""
