// In place of pg_net's worker: posts each queued request at once, however many are under way.
import postgres from 'postgres'

const sql = postgres(process.env.DATABASE_URL, { max: 1 })

async function post({ url, headers, body, timeout_milliseconds: milliseconds }) {
  const signal = AbortSignal.timeout(milliseconds)
  const reply = await fetch(url, { method: 'POST', headers, body: JSON.stringify(body), signal })
  await reply.arrayBuffer()
}

async function pump() {
  for (const request of await sql`DELETE FROM net.http_request_queue RETURNING *`) {
    post(request).catch((error) => console.error(String(error)))
  }
}

await sql.listen('http_request_queue', pump, pump)
console.log('ready')
