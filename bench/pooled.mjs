// The fetch of Node with pauses: node pooled.mjs <url> <body> <connections> <seconds> <pauses as JSON, one list a connection>
const [url, body, connections, seconds, pauses] = process.argv.slice(2);
const began = performance.now();
const elapsed = () => ((performance.now() - began) / 1000).toFixed(1);
const done = { requests: 0, failures: [] };

async function pauseAndPost(all) {
  for (const pause of all) {
    if (performance.now() + pause * 1000 > began + Number(seconds) * 1000) return;
    await new Promise((resume) => setTimeout(resume, pause * 1000));
    done.requests += 1;
    try {
      const answer = await fetch(url, { method: "POST", body, headers: { "Content-Type": "application/json" } });
      await answer.text();
      if (answer.status !== 200) done.failures.push(`status ${answer.status} after ${pause} s, at ${elapsed()} s`);
    } catch (error) {
      done.failures.push(`${error.cause ?? error} after ${pause} s, at ${elapsed()} s`);
    }
  }
}

await Promise.all(JSON.parse(pauses).slice(0, Number(connections)).map(pauseAndPost));
console.log(JSON.stringify(done));
